"""Commands of finished bundles: generate, chat, score, serve, package."""
