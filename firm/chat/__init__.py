"""The OpenAI chat wire, both ends: messages, clients, a journal of answers, a server."""
