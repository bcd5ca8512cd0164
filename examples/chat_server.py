"""A stand-in for the server of `caption.namer`: it names clusters without a model.

    python -m examples.chat_server --port 8123 &
    ratecluster caption --root demo-run \\
        --set caption.namer=http://127.0.0.1:8123 --set caption.namer_model=stub

The name is the colour of the first image and the best candidate. A real server works in the same
way: `ollama serve` with caption.namer=http://127.0.0.1:11434 and caption.namer_model=llava, or
`vllm serve Qwen/Qwen2.5-VL-7B-Instruct` with caption.namer=http://127.0.0.1:8000.
"""

import argparse
import base64
import io
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

PATH = "/v1/chat/completions"
COLOURS = {"red": 0, "yellow": 42, "green": 85, "blue": 156, "purple": 200}  # hue of 256
Answer = Callable[[dict[str, Any]], str]  # the request → the text of the answer


def named(request: dict[str, Any]) -> str:
    """The answer to a request of `ratecluster caption`, as {"caption": "…"}."""
    text, *images = request["messages"][0]["content"]
    shown = json.loads(text["text"].partition("\n\n")[2])
    data = base64.b64decode(images[0]["image_url"]["url"].partition(",")[2])
    hue, strength, _ = Image.open(io.BytesIO(data)).resize((1, 1)).convert("HSV").getpixel((0, 0))
    distance = {name: min(abs(hue - at), 256 - abs(hue - at)) for name, at in COLOURS.items()}
    colour = "grey" if strength < 25 else min(distance, key=lambda name: distance[name])
    return json.dumps({"caption": f"{colour} {[*shown['candidates'], 'thing'][0]}"})


def server(port: int, answer: Answer = named) -> ThreadingHTTPServer:
    """A server on this machine; port 0 means any free port. `serve_forever` starts it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != PATH:
                self.send_error(404)
                return
            message = {"role": "assistant", "content": answer(request)}
            body = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8123)
    server(parser.parse_args().port).serve_forever()
