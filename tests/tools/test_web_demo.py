"""The web page in a real browser: a picture goes in, boxes come out; what cannot work gives a message."""

import importlib.util
import shutil
import socket
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import LORS_DIGITS, ROOT, free_port, load_config, load_tool, random_lors, refused
from PIL import Image

CHROMIUM = shutil.which("chromium")
BROWSER_ARGUMENTS = [
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CONFIG = str(ROOT / LORS_DIGITS)
missing = [name for name in ("nicegui", "playwright") if importlib.util.find_spec(name) is None]
missing += [] if CHROMIUM else ["chromium"]
needs_browser = pytest.mark.skipif(bool(missing), reason=f"the web page is tested with {', '.join(missing)}: not here")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "lors.pth"
    weights = random_lors(load_config(LORS_DIGITS).model).state_dict()
    torch.save(dict(meta=dict(dataset_meta=dict(classes=tuple("0123456789"))), state_dict=weights), path)
    return str(path)


@pytest.fixture(scope="module")
def server(checkpoint, tiny_digits):
    """The tool in a thread of this process; the page's address."""
    import uvicorn

    started = []

    def serve(app, host, port, log_level):
        started.append(uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level=log_level)))
        started[0].run()

    port = free_port()
    arguments = ["web_demo.py", CONFIG, checkpoint, "--device", "cpu", "--port", str(port), "--max-megabytes", "0.5"]
    arguments += ["--score-thr", "0", "--cfg-options", f"test_dataloader.dataset.data_root={tiny_digits}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        patch.setattr(uvicorn, "run", serve)
        # NiceGUI serves its own test client instead of the page when it sees this.
        patch.delenv("PYTEST_CURRENT_TEST", raising=False)
        thread = threading.Thread(target=load_tool("web_demo.py").main, daemon=True)
        thread.start()
        deadline = time.monotonic() + 120
        while not (started and started[0].started):
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        started[0].should_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A fresh visit; at its end, nothing was asked of another machine and no script failed."""
    page = browser.new_page(viewport=dict(width=1180, height=820))
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(30_000)
    page.goto(server)
    yield page
    page.close()
    assert asked and all(url.startswith((server, "data:", "blob:")) for url in asked), asked
    assert not errors


def upload(page, *, name: str, data: bytes) -> None:
    page.set_input_files("input[type=file]", dict(name=name, mimeType="image/png", buffer=data))


@needs_browser
def test_a_picture_goes_in_and_boxes_come_out(page, tiny_digits, tmp_path):
    picture = sorted((tiny_digits / "val").iterdir())[0]
    upload(page, name=picture.name, data=picture.read_bytes())
    page.get_by_text(f"{picture.name}, 96 x 96 pixels: 20 boxes with a score above 0.00").wait_for()
    # Drawn, at the size of an enlarged picture, by the browser.
    image = page.locator("img[src^='data:image/jpeg']")
    image.wait_for()
    page.wait_for_function("document.querySelector(\"img[src^='data:image/jpeg']\").naturalWidth == 480")
    assert page.locator("tbody tr").count() == 10 and "1-10 of 20" in page.locator(".q-table__bottom").inner_text()
    scores = page.locator("tbody tr td:nth-child(2)").all_inner_texts()
    assert scores == sorted(scores, reverse=True)
    page.screenshot(path=tmp_path / "page.png")
    assert np.asarray(Image.open(tmp_path / "page.png")).std() > 10


@needs_browser
def test_the_slider_leaves_boxes_out(page):
    page.get_by_role("button", name="Try an example").click()
    page.get_by_text("20 boxes with a score above 0.00").wait_for()
    before = page.locator("img[src^='data:image/jpeg']").get_attribute("src")
    for _ in range(2):  # by 10 of the 20 steps each
        page.locator(".q-slider [tabindex='0']").press("PageUp")
    page.get_by_text("0 boxes with a score above 1.00").wait_for()
    assert page.locator("img[src^='data:image/jpeg']").get_attribute("src") != before


@needs_browser
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no image", "bad.png cannot be read as an image"),
        (b"", "bad.png cannot be read as an image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(600_000), "the file is not an image, or is larger than 0.5 MB"),
    ],
    ids=["text", "empty", "large"],
)
def test_a_bad_upload_gives_a_message(page, data, message):
    upload(page, name="bad.png", data=data)
    page.get_by_role("alert").get_by_text(message).wait_for()
    assert "Traceback" not in page.content()
    # The page goes on working.
    page.get_by_role("button", name="Try an example").click()
    page.get_by_text("20 boxes").wait_for()
    assert page.get_by_role("alert").inner_text() == ""


@pytest.mark.skipif("nicegui" in missing, reason="the web page needs NiceGUI: not here")
@pytest.mark.parametrize("side", [7_000, 20_000])
def test_a_small_file_of_many_pixels_is_refused(side, tmp_path):
    from mmdet_lors.errors import UserError
    from mmdet_lors.inference.pictures import Reader
    from mmdet_lors.inference.web import read_picture

    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(UserError, match="bomb.png has more than 40 million pixels"):
        read_picture((tmp_path / "bomb.png").read_bytes(), "bomb.png", Reader())


def test_without_nicegui_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nicegui", None)
    message = refused("web_demo.py", [CONFIG, "none.pth"], monkeypatch, capsys)
    assert message == "error: the web page needs NiceGUI: pip install -e .[web]"


@pytest.mark.skipif("nicegui" in missing, reason="the web page needs NiceGUI: not here")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port 70000: must be from 1 to 65535"),
        (["--max-megabytes", "0"], "--max-megabytes 0.0: must be above 0"),
        (["--max-pictures", "0"], "--max-pictures 0: must be 1 or more"),
        (["--queue", "-1"], "--queue -1: must be 0 or more"),
        (["--score-thr", "2"], "--score-thr 2.0: must be from 0 to 1"),
        (["--host", "300.0.0.1"], "cannot listen on 300.0.0.1:"),
        ([], "checkpoint none.pth does not exist"),
    ],
)
def test_refuses_in_one_line(options, message, monkeypatch, capsys):
    options = options if "--port" in options else [*options, "--port", str(free_port())]
    assert message in refused("web_demo.py", [CONFIG, "none.pth", *options], monkeypatch, capsys)


@pytest.mark.skipif("nicegui" in missing, reason="the web page needs NiceGUI: not here")
def test_a_port_in_use_is_refused(monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = refused("web_demo.py", [CONFIG, "none.pth", "--port", str(port)], monkeypatch, capsys)
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in message
