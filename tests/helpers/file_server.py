"""A stand-in for the Hugging Face Hub on this machine, with or without ranges."""

import contextlib
import hashlib
import http.server
import re
import threading


def revision_of(path):
    """Get the revision of a file's path; zeros are the newest one."""
    revision = re.search("/resolve/([0-9a-f]{40})/", path)
    return revision[1] if revision else "0" * 40


@contextlib.contextmanager
def serve(files, ranges=True):
    """Serve bytes by path; yield the address and a log of (path, range, bytes)."""
    log = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            data = files.get(self.path)
            if data is None:
                self.send_error(404)
                return
            wanted = self.headers.get("Range") if ranges else None
            total = len(data)
            if wanted:
                start, _, stop = wanted.removeprefix("bytes=").partition("-")
                start, stop = int(start), min(int(stop or total - 1) + 1, total)
                data = data[start:stop]
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", hashlib.sha256(files[self.path]).hexdigest())
            self.send_header("X-Repo-Commit", revision_of(self.path))
            self.end_headers()
            if body:
                log.append((self.path, wanted, len(data)))
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", log
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
