"""The HTTP API of a server in a process of its own: answers, refusals, bad files, load; and the code of its page."""

import ast
import asyncio
import importlib.util
import io
import json
import os
import pickle
import re
import shlex
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import LORS_DIGITS, ROOT, free_port, load_tool, refused, write_random_lors
from PIL import Image

from mmdet_lors.inference import Inferencer
from mmdet_lors.inference.pictures import MAX_PIXELS
from mmdet_lors.inference.results import boxes

httpx = pytest.importorskip("httpx", reason="the API is tested with httpx: not here")

CONFIG = str(ROOT / LORS_DIGITS)
LOAD_TEST = "analysis_tools/load_test.py"
PAGE = (ROOT / "docs" / "serving.md").read_text()
MEGABYTES = 1
UNREADABLE = "it cannot be read as an image"
TOO_MANY_PIXELS = "it has more than 40 million pixels"

needs_server = pytest.mark.skipif(
    importlib.util.find_spec("nicegui") is None, reason="the server needs NiceGUI: not here"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return write_random_lors(tmp_path_factory.mktemp("weights"))


class Server:
    """tools/web_demo.py in a process of its own."""

    def __init__(self, checkpoint: str, log: Path) -> None:
        port = free_port()
        self.url, self.log = f"http://127.0.0.1:{port}", log
        options = ["--port", str(port), "--queue", "2", "--max-megabytes", str(MEGABYTES), "--max-pictures", "3"]
        command = [sys.executable, "tools/web_demo.py", CONFIG, checkpoint, "--device", "cpu", *options]
        with log.open("w") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        deadline = time.monotonic() + 180
        while "open http" not in log.read_text() or not self.is_up():
            assert self.process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def is_up(self) -> bool:
        try:
            return self.client.get("/health").status_code == 200
        except httpx.ConnectError:
            return False

    def detect(self, *pictures: tuple[str, bytes], **options) -> httpx.Response:
        return self.client.post("/detect", files=[("image", picture) for picture in pictures], params=options)

    def connect(self, head: str, body: bytes = b"") -> socket.socket:
        """A connection on which the beginning of a request was sent."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=60)
        connection.sendall(f"POST /detect HTTP/1.1\r\nHost: {host}\r\n{head}\r\n\r\n".encode() + body)
        return connection

    def waits_for(self, requests: int) -> None:
        """Wait until so many requests are being answered or waiting."""
        deadline = time.monotonic() + 60
        while self.client.get("/health").json() != dict(requests=requests):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def memory(self, kind: str) -> float:
        """Resident memory, in MB: VmRSS, or VmHWM for the most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition(f"{kind}:")[2].split()[0]) / 1000


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """A server with a queue of 2, and at most 3 pictures of 1 MB; nothing makes it print a traceback."""
    started = Server(checkpoint, tmp_path_factory.mktemp("server") / "log.txt")
    yield started
    started.client.close()
    started.process.terminate()
    started.process.wait(60)
    assert "Traceback" not in started.log.read_text(), started.log.read_text()


@pytest.fixture(scope="module")
def pictures(tiny_digits) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted((tiny_digits / "val").iterdir())]


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


@needs_server
def test_several_pictures_have_the_boxes_that_the_inferencer_finds(server, pictures, checkpoint):
    inferencer = Inferencer(CONFIG, checkpoint, device="cpu", show_progress=False)
    small = ("small.png", saved(noise(64), "PNG"))
    sent = [*pictures[:2], small]
    response = server.detect(*sent, score_thr=0)
    assert response.status_code == 200 and response.headers["content-type"] == "application/json"
    for (name, content), row, size in zip(sent, response.json(), (96, 96, 64), strict=True):
        assert (row["image"], row["width"], row["height"]) == (name, size, size)
        expected = boxes(next(inferencer.stream(content))[1], inferencer.classes)
        assert len(row["boxes"]) == len(expected) == 20
        for found, wanted in zip(row["boxes"], expected, strict=True):
            assert found.keys() == wanted.keys()
            assert found["score"] == pytest.approx(wanted["score"], abs=1e-4)


@needs_server
def test_only_boxes_above_the_lowest_score_are_listed(server, pictures):
    scores = [box["score"] for box in server.detect(pictures[0], score_thr=0).json()[0]["boxes"]]
    lowest = sorted(scores)[10]
    found = server.detect(pictures[0], score_thr=lowest).json()[0]["boxes"]
    assert [box["score"] for box in found] == [score for score in scores if score > lowest]
    assert all(box["score"] > 0.3 for box in server.detect(pictures[0]).json()[0]["boxes"])  # the default


@needs_server
def test_a_picture_that_cannot_be_read_does_not_spoil_the_others(server, pictures):
    response = server.detect(pictures[0], ("bad.jpg", b"no image"), pictures[1])
    assert response.status_code == 200
    first, bad, last = response.json()
    assert "boxes" in first and "boxes" in last
    assert bad == dict(image="bad.jpg", error=UNREADABLE)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def jpeg(side: int) -> bytes:
    """A JPEG whose header claims this size."""
    content = bytearray(saved(noise(16), "JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", side, side)
    return bytes(content)


def two_sized_tiff(side: int) -> bytes:
    """A TIFF with two sizes: 10 x 10, which Pillow reads, and a square of this side, which OpenCV reads."""
    pixels = zlib.compress(bytes(side * side), 9)
    tags = [(256, side), (256, 10), (257, side), (257, 10), (258, 8), (259, 8), (262, 1), (273, 0), (277, 1)]
    tags += [(278, side), (279, len(pixels))]
    start = 8 + 2 + 12 * len(tags) + 4
    rows = [struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(rows) + bytes(4) + pixels


MALICIOUS = {
    "bomb.png": (lambda: saved(Image.new("1", (30_000, 30_000)), "PNG"), TOO_MANY_PIXELS),
    "two_sizes.tif": (lambda: two_sized_tiff(20_000), UNREADABLE),
    "truncated.jpg": (lambda: saved(noise(200), "JPEG")[:5000], UNREADABLE),
    "truncated.png": (lambda: saved(noise(200), "PNG")[:5000], UNREADABLE),
    "text.jpg": (lambda: b"This is no picture.", UNREADABLE),
    "pickle.jpg": (lambda: pickle.dumps(dict(state_dict={})), UNREADABLE),
    "svg.jpg": (
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        UNREADABLE,
    ),
    "empty.jpg": (lambda: b"", UNREADABLE),
    "header.png": (lambda: png(2**31 - 1, 2**31 - 1), TOO_MANY_PIXELS),
    "chunk.png": (lambda: struct.pack(">8sI4s", b"\x89PNG\r\n\x1a\n", 2**31 - 1, b"IHDR") + bytes(100), UNREADABLE),
    "header.jpg": (lambda: jpeg(65_500), TOO_MANY_PIXELS),
    "row.png": (lambda: saved(Image.new("RGB", (9000, 1)), "PNG"), "it, 9000 x 1 pixels, cannot be prepared"),
}


@needs_server
@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_file_is_refused_with_a_reason(name, server, pictures):
    make, reason = MALICIOUS[name]
    content = make()
    assert len(content) < MEGABYTES * 10**6
    server.detect(pictures[0])
    before = server.memory("VmHWM")
    response = server.detect((name, content))
    assert response.status_code == 422 and len(response.text.splitlines()) == 1
    [row] = response.json()
    assert row.keys() == {"image", "error"} and row["image"] == name and row["error"].startswith(reason)
    assert server.memory("VmHWM") < before + 100
    assert server.detect(pictures[0]).status_code == 200


@needs_server
@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_of_thousands_of_frames_only_the_first_is_read(kind, server):
    frames = [Image.fromarray(np.full((40, 30), i % 255, np.uint8)) for i in range(2000)]
    content = saved(frames[0], kind, save_all=True, append_images=frames[1:])[: MEGABYTES * 10**6]
    before = server.memory("VmHWM")
    [row] = server.detect((f"frames.{kind}", content)).json()
    assert (row["width"], row["height"]) == (30, 40)
    assert server.memory("VmHWM") < before + 100


@needs_server
@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", r"..\..\etc\passwd", r"C:\etc\passwd"])
def test_of_a_name_only_its_last_part_is_used(name, server, pictures):
    [row] = server.detect((name, pictures[0][1])).json()
    assert row["image"] == "passwd" and "boxes" in row
    [row] = server.detect((name, b"no image")).json()
    assert row == dict(image="passwd", error=UNREADABLE)


def parts(count: int, field: str = "image") -> tuple[dict, bytes]:
    """The header and body of a request with so many small parts."""
    part = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="a"\r\n\r\na\r\n'
    return {"Content-Type": "multipart/form-data; boundary=x"}, part.encode() * count + b"--x--\r\n"


HOW = "send pictures as curl -F image=@picture.jpg does"


@needs_server
@pytest.mark.parametrize(
    ("request_", "status", "reason"),
    [
        (dict(files=[("image", ("big.png", bytes(MEGABYTES * 10**6 + 1)))]), 413, "big.png is larger than 1 MB"),
        (dict(files=[("image", ("a", b"a"))] * 4), 400, "Too many files. Maximum number of files is 3."),
        (dict(zip(("headers", "content"), parts(10_000), strict=True)), 400, "Too many files."),
        (dict(files=[("picture", ("a", b"a"))]), 400, f"part 'picture' is no picture: {HOW}"),
        (dict(files=[("image", (None, b"a"))]), 400, f"part 'image' is no picture: {HOW}"),
        (dict(zip(("headers", "content"), parts(0), strict=True)), 400, f"there is no picture: {HOW}"),
        (dict(headers={"Content-Type": "multipart/form-data; boundary=x"}, content=b"y"), 400, "Invalid multipart"),
        (dict(headers={"Content-Type": "multipart/form-data"}, content=b"y"), 400, "Missing boundary"),
        (dict(content=b"a"), 415, f"the body is not multipart/form-data: {HOW}"),
        (dict(data=dict(image="a")), 415, f"the body is not multipart/form-data: {HOW}"),
        (dict(params=dict(score_thr=2)), 422, "score_thr=2: must be a number from 0 to 1"),
        (dict(params=dict(score_thr="nan")), 422, "score_thr=nan: must be a number from 0 to 1"),
        (dict(params=dict(score_thr="a" * 1000)), 422, "score_thr=aaaaaaaaaaaaaaaaaaaa: must be a number from 0 to 1"),
    ],
)
def test_a_bad_request_is_refused_with_a_reason(request_, status, reason, server):
    response = server.client.post("/detect", **request_)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    assert response.json()["detail"].startswith(reason)


@needs_server
def test_a_long_body_is_refused_before_it_is_sent(server):
    with server.connect("Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 9000000000") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


@needs_server
def test_a_long_body_without_a_length_is_not_kept(server):
    sent = 0

    def endless():
        nonlocal sent
        yield parts(1)[1].removesuffix(b"\r\n--x--\r\n")
        for _ in range(300):
            sent += 1
            yield bytes(10**6)

    before = server.memory("VmHWM")
    response = server.client.post("/detect", headers=parts(0)[0], content=endless())
    assert response.status_code == 413 and response.text == '{"detail":"Content Too Large"}'
    assert server.memory("VmHWM") < before + 100
    server.waits_for(0)


@needs_server
def test_who_comes_when_the_queue_is_full_is_refused_at_once(server, pictures):
    request = server.client.build_request("POST", "/detect", files=[("image", pictures[0])])
    body = request.read()
    head = f"Content-Type: {request.headers['content-type']}\r\nContent-Length: {len(body)}\r\nConnection: close"
    slow = [server.connect(head, body[:-100]) for _ in range(3)]
    server.waits_for(3)
    response = server.detect(pictures[0])
    assert response.status_code == 503 and response.headers["retry-after"] == "1"
    assert response.json() == dict(detail="2 requests are waiting already: try again later")
    for connection in slow:
        connection.sendall(body[-100:])
    for connection in slow:
        with connection, connection.makefile("rb") as file:
            assert file.readline().startswith(b"HTTP/1.1 200 ") and b'"boxes"' in file.read()
    assert server.detect(pictures[0]).status_code == 200


@needs_server
def test_who_goes_away_leaves_a_place(server, pictures):
    gone = server.connect("Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000", b"--x\r\n")
    server.waits_for(1)
    gone.close()
    server.waits_for(0)


@needs_server
def test_a_body_that_does_not_arrive_loses_its_place(monkeypatch):
    from fastapi import FastAPI

    from mmdet_lors.inference import api

    monkeypatch.setattr(api, "UPLOAD_SECONDS", 0.1)
    app = FastAPI()
    api.add_api(app, inferencer=None, limits=api.Limits())

    async def slow():
        yield b"--x\r\n"
        await asyncio.sleep(60)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            refused = await client.post("/detect", headers=parts(0)[0], content=slow())
            return refused, await client.get("/health")

    refused, health = asyncio.run(ask())
    assert refused.status_code == 408
    assert refused.json() == dict(detail="the request did not arrive within 0.1 seconds")
    assert health.json() == dict(requests=0)


@needs_server
def test_clients_at_the_same_time_are_answered_or_refused(server, tiny_digits, call_tool, capsys):
    images = sorted((tiny_digits / "val").iterdir())
    url = f"{server.url}/detect"
    call_tool(LOAD_TEST, url, *images, "--clients", 2, "--seconds", 3, "--pictures", 2, "--pid", server.process.pid)
    first, speed, memory = capsys.readouterr().out.splitlines()
    counts = re.fullmatch(r"2 clients, 3 s: (\d+) requests, (\d+) answered, 0 refused, 0 failed", first)
    assert int(counts[1]) == int(counts[2]) > 1
    assert re.fullmatch(r"answered in \d+\.\d+ s \(median\), \d+\.\d+ s \(95%\); \d+\.\d pictures/s", speed)
    megabytes = [float(number) for number in re.findall(r"([\d.]+) MB", memory)]
    assert len(megabytes) == 4 and megabytes[2] == pytest.approx(server.memory("VmHWM"), rel=0.5)

    call_tool(LOAD_TEST, url, *images, "--clients", 8, "--seconds", 3)
    first, *_, last = capsys.readouterr().out.splitlines()
    counts = re.fullmatch(r"8 clients, 3 s: (\d+) requests, (\d+) answered, (\d+) refused, 0 failed", first)
    asked, answered, refused_ = map(int, counts.groups())
    assert asked == answered + refused_ and answered and refused_
    assert last == f'{refused_} refused: 503 {{"detail":"2 requests are waiting already: try again later"}}'


def test_a_load_test_that_cannot_work_is_refused(tiny_digits, monkeypatch, capsys):
    image = str(tiny_digits / "val" / "000001.png")
    url = f"http://127.0.0.1:{free_port()}/detect"
    for arguments, message in [
        ([url, image, "--seconds", "0.1", "--clients", "2"], "error: 2 of 2 requests failed"),
        ([url, image, "--clients", "0"], "error: --clients 0: must be above 0"),
        ([url, "none.png"], "error: image none.png does not exist"),
        ([url, image, "--pid", "999999999"], "error: --pid 999999999: its memory cannot be read: No such file"),
    ]:
        assert refused(LOAD_TEST, arguments, monkeypatch, capsys).startswith(message)


def test_opencv_has_the_limit_that_pillow_is_asked_for():
    tool = (ROOT / "tools" / "web_demo.py").read_text()
    assert re.findall(r'"OPENCV_IO_MAX_IMAGE_PIXELS", "(\d+)"', tool) == [str(MAX_PIXELS)]


def test_a_server_error_is_a_failure():
    outcome_of = load_tool(LOAD_TEST).outcome_of
    assert outcome_of(500, "Internal Server Error") == "failed: 500 Internal Server Error"
    assert outcome_of(422, "a\nb") == "refused: 422 a b" and outcome_of(503, "").startswith("failed")


def blocks(language: str) -> list[str]:
    """The page's code in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


@needs_server
def test_curl_as_the_page_says(server, tiny_digits):
    [block] = [block for block in blocks("bash") if "curl" in block]
    text = block.replace("data/digits", str(tiny_digits)).replace("http://127.0.0.1:8080", server.url)
    commands = [shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("curl")]
    assert len(commands) > 1
    env = dict(os.environ, no_proxy="*")
    for command in commands:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        rows = json.loads(done.stdout)
        sent = [Path(word).name for word in command if word.startswith("image=@")]
        assert [row["image"] for row in rows] == sent and all("boxes" in row for row in rows)
    [shown] = map(json.loads, blocks("json"))
    assert [row.keys() for row in shown] == [row.keys() for row in rows[: len(shown)]]


@pytest.fixture(scope="module")
def detect_py(tmp_path_factory, checkpoint) -> Path:
    """The page's Python in a folder with the ONNX file of a small model."""
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("onnx")
    code, _ = blocks("python")  # the other is OpenVINO's
    (folder / "detect.py").write_text(code.replace("score > 0.3", "score > 0"))
    tool = "deployment/export_onnx.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [tool, CONFIG, checkpoint, str(folder / "detector.onnx"), "--size", "96x96"])
        load_tool(tool).main()
    return folder / "detect.py"


def test_the_python_of_the_page_finds_what_the_inferencer_finds(detect_py, tiny_digits, checkpoint, tmp_path):
    paths = [tiny_digits / "val" / "000001.png", tmp_path / "large.png"]
    noise(288).resize((192, 288)).save(paths[1])
    command = [sys.executable, "detect.py", "detector.onnx", *map(str, paths)]
    done = subprocess.run(command, cwd=detect_py.parent, capture_output=True, text=True, timeout=120)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 40, done.stderr
    inferencer = Inferencer(CONFIG, checkpoint, device="cpu", show_progress=False)
    for path, scale in zip(paths, ([1, 1, 1, 1], [2, 3, 2, 3]), strict=True):
        small = Image.open(path).convert("RGB").resize((96, 96), Image.Resampling.BILINEAR)
        expected = boxes(next(inferencer.stream(small))[1], inferencer.classes)
        found = [line[1:] for line in lines if line[0] == str(path)]
        assert [line[0] for line in found] == [str(box["label"]) for box in expected]
        assert np.allclose([float(line[1]) for line in found], [box["score"] for box in expected], atol=1e-3)
        bboxes = np.array([line[2:] for line in found], float)
        assert np.allclose(bboxes, [np.multiply(box["bbox"], scale) for box in expected], atol=0.1)


def test_the_container_file_has_what_the_python_needs_and_starts_it(detect_py, tiny_digits):
    [text] = blocks("dockerfile")
    lines = dict(line.split(" ", 1) for line in text.splitlines())
    code = ast.parse(detect_py.read_text())
    modules = {alias.name for node in ast.walk(code) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(code) if isinstance(node, ast.ImportFrom)}
    assert modules - sys.stdlib_module_names == {"numpy", "onnxruntime", "PIL"}
    assert set(lines["RUN"].split()) >= {"numpy", "onnxruntime", "pillow"}
    *copied, target = lines["COPY"].split()
    assert all((detect_py.parent / name).is_file() for name in copied)
    start = [word.replace(target, f"{detect_py.parent}/") for word in json.loads(lines["ENTRYPOINT"])]
    picture = str(tiny_digits / "val" / "000001.png")
    done = subprocess.run([sys.executable, *start[1:], picture], capture_output=True, text=True, timeout=120)
    assert len(done.stdout.splitlines()) == 20, done.stderr
