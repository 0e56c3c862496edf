"""The page that asv publishes, as a browser without a network shows it.

Results of a few commits of a small repository are written as asv keeps them, with a regression planted, and
published with this project's own settings. Chromium opens the page from a server here, with the scripts that
it has from elsewhere taken from Debian's packages. A script added to the page counts the points that a graph
really draws.
"""

import functools
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from html import unescape
from pathlib import Path

import browser
import pytest

SETTINGS = Path(__file__).parent.parent / "asv_benchmarks" / "asv.conf.json"
FLAGS = (*browser.FLAGS, "--virtual-time-budget=20000", "--dump-dom")
LIBRARIES = Path("/usr/share/javascript")
SCRIPTS = {
    "jquery-3.3.1.min.js": "jquery/jquery.min.js",
    "jquery.flot.min.js": "jquery-flot/jquery.flot.min.js",  # with the plugins below
    "jquery.flot.time.min.js": None,
    "jquery.flot.selection.min.js": None,
    "jquery.flot.categories.min.js": None,
    "jquery.flot.orderBars.js": None,  # for bars alone
    "stupidtable.min.js": "jquery-stupidtable/stupidtable.min.js",
    "md5.min.js": "blueimp-md5/md5.min.js",
    "bootstrap.min.js": "bootstrap/js/bootstrap.min.js",
    "bootstrap.min.css": "bootstrap/css/bootstrap.min.css",
}
# The middle of a point is filled with white, on a canvas without a ground.
PROBE = """<script>
const look = setInterval(() => {
  const plot = window.jQuery && jQuery("#main-graph").data("plot");
  if (!plot) return;
  clearInterval(look);
  const context = plot.getCanvas().getContext("2d");
  const drawn = plot.getData().flatMap(series => series.data.filter(([x, y]) => {
    const place = plot.pointOffset({x, y});
    return context.getImageData(place.left, place.top, 1, 1).data.every(channel => channel == 255);
  }));
  document.body.setAttribute("drawn-points", drawn.length);
}, 100);
</script></body>"""

N_COMMITS, FIRST_SLOW = 10, 6
PLANTED = "cross_entropy_forward.CrossEntropyForward.track_value_over_read"
# name: the unit, the value before, and by how much it grows: only the planted one by more than its kind may
SERIES = {
    PLANTED: ("times a read", 1.5, 1.3),
    "cross_entropy_fused.CrossEntropyFused.track_value_and_grad_over_copy": ("times a copy", 1.2, 1.08),
    "cross_entropy_forward.CrossEntropyForward.time_value": ("seconds", 0.01, 1.25),
    "accuracy.Accuracy.track_max_ulp_of_losses": ("ulp", 4.0, 1.2),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Publish, and return the address of the page."""
    missing = ["asv"] if importlib.util.find_spec("asv") is None else []
    missing += [
        name
        for name, there in (("Chromium", browser.CHROMIUM), (SETTINGS.name, SETTINGS.exists()))
        if not there
    ]
    missing += [path for path in SCRIPTS.values() if path and not (LIBRARIES / path).exists()]
    if missing:
        reason = f"the page cannot be shown without {', '.join(missing)}"
        (pytest.fail if "LOGITLOSS_REQUIRE_DASHBOARD" in os.environ else pytest.skip)(reason)
    folder = tmp_path_factory.mktemp("dashboard")
    publish(folder)
    handler = functools.partial(Handler, directory=str(folder / "html"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def publish(folder):
    from asv.util import load_json

    (folder / "repository").mkdir()
    results = folder / "results" / "machine"
    results.mkdir(parents=True)
    write(results / "machine.json", {"machine": "machine", "version": 1})
    benchmarks = {
        name: {
            "name": name,
            "type": "time" if unit == "seconds" else "track",
            "unit": unit,
            "params": [["'cython-avx2'"]],
            "param_names": ["backend"],
            "version": "1",
            "code": "",
        }
        for name, (unit, _, _) in SERIES.items()
    }
    write(results.parent / "benchmarks.json", {**benchmarks, "version": 2})
    for number, (commit, seconds) in enumerate(commits(folder / "repository")):
        values = {
            name: [[before * (growth if number >= FIRST_SLOW else 1)], [["'cython-avx2'"]], "1"]
            for name, (_, before, growth) in SERIES.items()
        }
        result = {
            "commit_hash": commit,
            "env_name": "environment",
            "date": 1000 * seconds,
            "params": {"machine": "machine", "python": "3"},
            "python": "3",
            "requirements": {},
            "env_vars": {},
            "result_columns": ["result", "params", "version"],
            "results": values,
            "durations": {},
            "version": 2,
        }
        write(results / f"{commit[:8]}-environment.json", result)
    places = {"repo": "repository", "results_dir": "results", "html_dir": "html"}
    write(folder / SETTINGS.name, load_json(str(SETTINGS), js_comments=True) | places)
    command = [sys.executable, "-m", "asv", "--config", folder / SETTINGS.name, "publish"]
    subprocess.run(command, check=True)


def write(path, content):
    path.write_text(json.dumps(content))


def commits(repository):
    """Make commits an hour apart, and yield their names and times."""

    def git(*arguments, **variables):
        command = ["git", "-c", "user.name=test", "-c", "user.email=", *arguments]
        environment = {**os.environ, **variables}
        run = subprocess.run(command, cwd=repository, env=environment, check=True, capture_output=True)
        return run.stdout.decode().strip()

    git("init", "--initial-branch", "main")
    for number in range(N_COMMITS):
        seconds = 1_600_000_000 + 3600 * number
        date = f"{seconds} +0000"
        git("commit", "--allow-empty", "--message", "-", GIT_COMMITTER_DATE=date, GIT_AUTHOR_DATE=date)
        yield git("rev-parse", "HEAD"), seconds


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve the site, with the scripts that are here in place of those elsewhere."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/":
            page = Path(self.directory, "index.html").read_text()
            elsewhere = r'(src|href)="https://[^"]*/([^"/]+)" integrity="[^"]*" crossorigin="anonymous"'
            self.reply(re.sub(elsewhere, r'\1="scripts/\2"', page).replace("</body>", PROBE), "text/html")
        elif path.startswith("/scripts/"):
            here = SCRIPTS[path.removeprefix("/scripts/")]
            kind = "text/css" if path.endswith(".css") else "text/javascript"
            self.reply((LIBRARIES / here).read_text() if here else "", kind)
        else:
            super().do_GET()

    def reply(self, text, kind):
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


def shown(address, folder):
    """Return the text of the page once its scripts have run."""
    command = [browser.CHROMIUM, *FLAGS, f"--user-data-dir={folder}", address]
    return unescape(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


def test_a_graph_draws_its_points(site, tmp_path):
    page = shown(f"{site}#{PLANTED}", tmp_path)
    assert re.findall(r'drawn-points="(\d+)"', page) == [str(N_COMMITS)]


def test_the_planted_regression_alone_is_listed(site, tmp_path):
    page = shown(f"{site}#/regressions", tmp_path)
    listed = re.findall(r"<tr.*?</tr>", page.partition('id="regressions-body"')[2], re.DOTALL)
    rows = [row for row in listed if any(name in row for name in SERIES)]
    assert len(rows) == 1
    assert PLANTED in rows[0]
    assert "1.30x" in rows[0]
