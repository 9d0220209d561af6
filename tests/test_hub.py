"""Published weights: digests, and the hub, played by a server on this machine."""

import dataclasses
import hashlib
import http.server
import os
import sys
import threading

import huggingface_hub.constants
import pytest
import safetensors.numpy

from tests.toy_family import (
    FAMILY,
    assert_leaves,
    torch_arrays,
    wanted_leaves,
)
from zoo import registry
from zoo.errors import WeightsError
from zoo.formats.readers import file_sha256
from zoo.pretrained import load_pretrained

pytestmark = pytest.mark.usefixtures("toy")


def test_digest_of_a_tag(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(torch_arrays(), path)
    digest = file_sha256(path)
    with pytest.raises(WeightsError, match=f"sha256 is {digest}, that of toy_tiny.known is {'0' * 64}"):
        load_pretrained("toy_tiny.known", path)
    assert load_pretrained("toy_tiny.hub", path)[2].digest == "unknown"
    assert load_pretrained("toy_tiny", path)[2].digest == "unknown"
    cfg = dataclasses.replace(FAMILY.pretrained["toy_tiny.known"], sha256=digest)
    family = dataclasses.replace(FAMILY, pretrained={cfg.tag: cfg})
    registry._FAMILY_OF["toy_tiny"] = registry._FAMILIES["toy"] = family
    assert load_pretrained("toy_tiny.known", path)[2].digest == "matches"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub on this machine; `serve` says what it does."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # The pauses between the client's attempts.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    data = safetensors.numpy.save(torch_arrays())

    class Hub(http.server.BaseHTTPRequestHandler):
        serve = "all"
        requests = []

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            self.requests.append((self.command, self.path))
            if self.serve == "nothing" or not self.path.endswith("/toys/toy/resolve/main/model.safetensors"):
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound" if self.serve == "nothing" else "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0123456789abcdef" * 2 + "01234567")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if body:
                sent = data[start:] if self.serve != "half" else data[start : start + 100]
                self.wfile.write(b"\0" * len(sent) if self.serve == "noise" else sent)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        yield Hub
        running.shutdown()
        thread.join()


def files(directory):
    return [name for _, _, names in os.walk(directory) for name in names if "weights" in name or "safetensors" in name]


def test_fetched_and_cached(server, tmp_path):
    _, variables, report = load_pretrained("toy_tiny.hub")
    assert_leaves(variables, wanted_leaves(torch_arrays()))
    assert report.tag == "toy_tiny.hub" and report.source.startswith(str(tmp_path / "cache"))
    # The first of the names that the tag lists is not there.
    assert ("HEAD", "/toys/toy/resolve/main/missing.safetensors") in server.requests
    gets = sum(command == "GET" for command, _ in server.requests)
    load_pretrained("toy_tiny.hub")
    assert gets == 1 == sum(command == "GET" for command, _ in server.requests)


def test_not_on_the_hub(server, tmp_path):
    server.serve = "nothing"
    with pytest.raises(WeightsError, match="there is no public repository toys/toy") as error:
        load_pretrained("toy_tiny.hub")
    url = f"{os.environ['HF_ENDPOINT']}/toys/toy/resolve/main/missing.safetensors"
    assert f"download {url}\n  and pass it: zoo.load_pretrained('toy_tiny', 'missing.safetensors')" in str(error.value)
    server.serve = "all"
    load_pretrained("toy_tiny.hub")
    with pytest.raises(WeightsError, match=r"cannot be fetched \(link dead; see here\); pass a file as source="):
        load_pretrained("toy_tiny.lost")


def test_connection_that_breaks(server, tmp_path):
    server.serve = "half"
    with pytest.raises(WeightsError, match="could not be fetched from http://127.0.0.1"):
        load_pretrained("toy_tiny.hub")
    assert files(tmp_path / "cache") == []
    server.serve = "all"
    assert_leaves(load_pretrained("toy_tiny.hub")[1], wanted_leaves(torch_arrays()))


def test_download_with_wrong_content(server):
    server.serve = "noise"
    with pytest.raises(WeightsError, match="model.safetensors: .*(truncated|damaged)"):
        load_pretrained("toy_tiny.hub")


def test_damage_in_the_cache(server, tmp_path):
    _, _, report = load_pretrained("toy_tiny.hub")
    with open(report.source, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(WeightsError, match="damaged in the cache, its sha256 is .* delete .*/blobs/"):
        load_pretrained("toy_tiny.hub")


def test_offline(server, monkeypatch):
    load_pretrained("toy_tiny.hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    load_pretrained("toy_tiny.hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", huggingface_hub.constants.HF_HUB_CACHE + "2")
    with pytest.raises(WeightsError, match="no connection, or HF_HUB_OFFLINE is set\n  download http://127"):
        load_pretrained("toy_tiny.hub")


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'attention-zoo\[hub\]', or download https?://"):
        load_pretrained("toy_tiny.hub")
