"""Ray Serve application: an OpenAI-compatible HTTP gateway, continuous batching, batch jobs, the studio page."""
