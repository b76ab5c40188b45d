"""Both ends of the OpenAI chat protocol: messages, clients, a journal of answers, a server."""
