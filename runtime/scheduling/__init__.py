"""Many callers, one engine: requests, the cache's slots, the queue, the thread that runs them. May import runtime but generate."""
