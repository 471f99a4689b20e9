"""A service as data teams write it: imports half of the scientific stack, then answers HTTP on $PORT."""

import http.server
import os

import numpy
import pandas
import scipy.signal
import sklearn.linear_model


def answer() -> bytes:
    """A small computation that touches every library which was imported."""
    x = numpy.linspace(0.0, 1.0, 256)
    smooth = scipy.signal.savgol_filter(x, 31, 2)
    frame = pandas.DataFrame({"x": x, "y": 3.0 * smooth})
    model = sklearn.linear_model.LinearRegression().fit(frame[["x"]], frame["y"])
    return f"slope {model.coef_[0]:.3f}\n".encode()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers every GET with the same computation."""

    def do_GET(self) -> None:
        body = answer()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8080"))
    http.server.ThreadingHTTPServer(("0.0.0.0", port), Handler).serve_forever()
