"""Servers that speak OpenAI's protocol: asked with retries and a budget, what they answer kept for good."""
