"""OpenAI's HTTP interface over loaded bundles, for `headfold serve`. Above every other room of runtime; needs the extra `serve`."""
