"""The main job: pipeline, writer, cache scales, genai configuration, inspection. May import parity, conversion, training and below."""
