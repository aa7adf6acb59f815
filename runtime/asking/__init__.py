"""What callers may ask for, checked before it waits: options, prompts, and the requests that a call becomes."""
