"""What each address does: a call begun, its answers collected or streamed."""
