"""Serves the teacher over HTTP in the OpenAI protocol: `python -m firm.shapes.serve --port 8000`.

With FIRM_TEACHER_TOKEN in the environment, requests must carry it as a bearer token. There must be one where other
machines can reach the address, unless `--no-key` says that it needs none.
"""

import argparse

from firm.chat.client import PythonClient
from firm.chat.key import read_key
from firm.chat.server import ChatServer

MODEL = "pixel-teacher"
TOKEN = "FIRM_TEACHER_TOKEN"


def teacher_server(host: str = "127.0.0.1", port: int = 0, no_key: bool = False) -> ChatServer:
    """Returns a server of the teacher; by default it binds to this machine only, on a free port."""
    chat = PythonClient("firm.shapes.teacher:PixelTeacher")
    chat.name = MODEL
    return ChatServer(chat, host, port, token=read_key(host, TOKEN, no_key))


def main() -> None:
    """Serves on the command line's host and port until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--no-key", action="store_true")
    arguments = parser.parse_args()
    teacher_server(arguments.host, arguments.port, arguments.no_key).serve()


if __name__ == "__main__":
    main()
