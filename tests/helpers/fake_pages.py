"""Servers on the loopback that answer GET with what a test wants, or never."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Pages:
    """Text by path; settable while it serves. ``@`` becomes the number of the fetch."""

    def __init__(self, **pages):
        self.pages = {f"/{path}": text for path, text in pages.items()}
        self.status = 200
        self.hang_s = 0.0
        self.fetched = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.fetched += 1
                time.sleep(outer.hang_s)
                text = outer.pages.get(self.path)
                body = (text or "not found").replace("@", str(outer.fetched)).encode()
                try:
                    self.send_response(outer.status if text is not None else 404)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except ConnectionError:
                    pass

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()
