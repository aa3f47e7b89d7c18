"""OpenAI's HTTP API over the batcher."""
