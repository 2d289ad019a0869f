"""A web page on this machine: a picture goes in, boxes come out. Needs NiceGUI."""

import base64
import logging
from io import BytesIO
from pathlib import Path

import mmcv
import numpy as np
from fastapi import FastAPI
from mmdet.structures import DetDataSample
from nicegui import events, run, ui
from PIL import Image

from mmdet_lors.errors import UserError

from .api import Limits, add_api
from .inferencer import Inferencer
from .pictures import Reader, check_pixels, name_of
from .results import boxes

SHOWN_SIDE = 1600
"""Longer side, in pixels, of what is sent to the browser."""
COLUMNS = [
    dict(name=name, label=label, field=name, align=align, sortable=True)
    for name, label, align in (
        ("class", "class", "left"),
        ("score", "score", "right"),
        ("x1", "left", "right"),
        ("y1", "top", "right"),
        ("x2", "right", "right"),
        ("y2", "bottom", "right"),
    )
]


def read_picture(data: bytes, name: str, reader: Reader) -> np.ndarray:
    """An image file's content as (H, W, 3), BGR, in the frame in which the detector's config loads it.

    Raises:
        UserError: the file is not an image, or has too many pixels.
    """
    check_pixels(data, name)
    try:
        return reader.colours(data)
    except UserError as error:
        raise UserError(str(error).replace(name_of(data), name)) from error


class Detections:
    """One picture's detections, kept so that another lowest score does not need another run of the detector."""

    def __init__(self, inferencer: Inferencer, image: np.ndarray, name: str) -> None:
        self.inferencer, self.image, self.name = inferencer, image, name
        self.sample: DetDataSample = next(inferencer.stream(image))[1]

    def picture(self, score_thr: float) -> tuple[str, int]:
        """The picture with its boxes, as a ``data:`` URL, and its width."""
        drawn = self.inferencer.draw(self.image, self.sample, score_thr)
        if max(drawn.shape[:2]) > SHOWN_SIDE:
            drawn = mmcv.imrescale(drawn, (SHOWN_SIDE, SHOWN_SIDE))
        file = BytesIO()
        Image.fromarray(drawn).save(file, "JPEG", quality=90)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode(), drawn.shape[1]

    def rows(self, score_thr: float) -> list[dict]:
        """The table: one row per box, in pixels of the picture."""
        return [
            dict(zip(("x1", "y1", "x2", "y2"), map(round, box["bbox"]), strict=True))
            | {"id": i, "class": box["class"], "score": f"{box['score']:.3f}"}
            for i, box in enumerate(boxes(self.sample, self.inferencer.classes, score_thr))
        ]


class Page:
    """One visitor's page."""

    def __init__(
        self, inferencer: Inferencer, title: str, example: Path | None, max_bytes: int, score_thr: float
    ) -> None:
        self.inferencer, self.max_bytes = inferencer, max_bytes
        self.example = example
        self.found: Detections | None = None
        self.asked = 0
        ui.colors(primary="#1f5f8b")
        with ui.header().classes("items-baseline"):
            ui.label("Object detection").classes("text-xl font-medium")
            ui.label(title).classes("text-sm opacity-80")
        with ui.row().classes("w-full max-w-6xl mx-auto p-2 gap-6 items-start"):
            with ui.column().classes("w-80 gap-4"):
                self._inputs(score_thr)
            with ui.column().classes("grow gap-4 min-w-80"):
                self._outputs()

    def _inputs(self, score_thr: float) -> None:
        limit = f"at most {self.max_bytes / 10**6:g} MB"
        upload = ui.upload(
            label=f"Picture ({limit})",
            auto_upload=True,
            max_file_size=self.max_bytes,
            on_upload=self.uploaded,
            on_rejected=lambda: self.say(f"the file is not an image, or is larger than {self.max_bytes / 10**6:g} MB"),
        )
        self.upload = upload.props('accept="image/*" flat bordered').classes("w-full")
        if self.example:
            ui.button("Try an example", icon="image", on_click=self.take_example).props("outline no-caps")
        with ui.column().classes("w-full gap-0"):
            with ui.row().classes("w-full justify-between"):
                ui.label("Lowest score")
                value = ui.label().classes("font-medium")
            self.slider = ui.slider(min=0, max=1, step=0.05, value=score_thr).props('aria-label="Lowest score"')
            self.slider.on("change", self.slid)  # when it is let go
            value.bind_text_from(self.slider, "value", backward=lambda v: f"{v:.2f}")
        self.message = ui.label().classes("text-negative").props("role=alert")

    def _outputs(self) -> None:
        self.summary = ui.label("Choose a picture, or drop one here.").classes("text-base").mark("summary")
        self.spinner = ui.spinner(size="lg")
        self.spinner.visible = False
        self.picture = ui.image().classes("w-full rounded shadow").props("no-spinner alt=Boxes")
        self.picture.visible = False
        self.table = ui.table(columns=COLUMNS, rows=[], row_key="id", pagination=10).classes("w-full max-w-2xl")
        self.table.props("flat bordered dense")
        self.table.visible = False

    def say(self, message: str) -> None:
        """Show what went wrong; an empty message clears it."""
        self.message.text = message

    async def uploaded(self, event: events.UploadEventArguments) -> None:
        """Detect objects in the uploaded picture."""
        self.upload.reset()
        if event.file.size() > self.max_bytes:
            self.say(f"{event.file.name} is larger than {self.max_bytes / 10**6:g} MB")
            return
        await self.detect(await event.file.read(), event.file.name)

    async def take_example(self) -> None:
        """Detect objects in the example."""
        await self.detect(await run.io_bound(self.example.read_bytes), self.example.name)

    async def detect(self, data: bytes, name: str) -> None:
        """Run the detector in a thread, then show what it found, or say why not."""
        self.say("")
        self.spinner.visible = True
        self.asked = asked = self.asked + 1
        message = ""
        try:
            found = await run.io_bound(
                lambda: Detections(self.inferencer, read_picture(data, name, self.inferencer.reader), name)
            )
            if asked == self.asked:  # the visitor may have chosen another picture meanwhile
                self.found = found
                await self.show()
        except UserError as error:
            message = str(error)
        except Exception:
            logging.getLogger(__name__).exception("detection failed")
            message = f"{name}: the detector failed; the reason is in the server's output"
        if asked == self.asked:
            self.spinner.visible = False
            self.say(message)

    async def slid(self, event: events.GenericEventArguments) -> None:
        """Use another lowest score; the slider's own value may still be on its way."""
        self.slider.value = event.args
        await self.show()

    async def show(self) -> None:
        """Show the picture and the table of boxes above the lowest score."""
        found, score_thr = self.found, self.slider.value
        if found is None:
            return
        source, shown_width = await run.io_bound(found.picture, score_thr)
        if (found, score_thr) != (self.found, self.slider.value):
            return  # a later picture or score is on its way
        self.picture.set_source(source)
        self.picture.style(f"max-width: {shown_width}px")
        self.table.rows = found.rows(score_thr)
        height, width = found.image.shape[:2]
        count = len(self.table.rows)
        self.summary.text = (
            f"{found.name}, {width} x {height} pixels: {count} {'box' if count == 1 else 'boxes'} "
            f"with a score above {score_thr:.2f}"
        )
        self.picture.visible = self.table.visible = True


def make_app(
    inferencer: Inferencer, title: str, example: Path | None, limits: Limits, score_thr: float = 0.3
) -> FastAPI:
    """The page and the API; it loads nothing from elsewhere. One per process: NiceGUI's pages are global.

    Args:
        inferencer: the detector, which visitors share.
        title: what the page shows as its model.
        example: an image to try, or None.
        limits: what is accepted.
        score_thr: where the slider starts, and the API's lowest score.
    """

    @ui.page("/")
    def page() -> None:
        Page(inferencer, title, example, limits.max_bytes, score_thr)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_api(app, inferencer, limits, score_thr)
    ui.run_with(app, title="mmdet_lors", favicon="🔍", show_welcome_message=False)
    return app
