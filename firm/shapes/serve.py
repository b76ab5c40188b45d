"""Serves the teacher over HTTP in the OpenAI protocol: `python -m firm.shapes.serve --port 8000`.

With FIRM_TEACHER_TOKEN in the environment, requests must carry it as a bearer token.
"""

import argparse
import os

from firm.chat.client import PythonClient
from firm.chat.server import ChatServer

MODEL = "pixel-teacher"


def teacher_server(host: str = "127.0.0.1", port: int = 0) -> ChatServer:
    """Returns a server of the teacher; by default it binds to this machine only, on a free port."""
    chat = PythonClient("firm.shapes.teacher:PixelTeacher")
    chat.name = MODEL
    return ChatServer(chat, host, port, token=os.environ.get("FIRM_TEACHER_TOKEN", ""))


def main() -> None:
    """Serves on the command line's host and port until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    teacher_server(arguments.host, arguments.port).serve()


if __name__ == "__main__":
    main()
