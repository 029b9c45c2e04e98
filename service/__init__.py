"""The standalone KV-cache service: chunks, documents and an OpenAI-compatible API over HTTP, safe by default."""
