"""What goes over the wire, in OpenAI's terms: requests, answers, errors, tool calls. Nothing here asks a model."""
