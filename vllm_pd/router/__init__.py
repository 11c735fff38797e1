"""OpenAI front of a deployment: sends every request prefill-first over HTTP."""
