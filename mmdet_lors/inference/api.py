"""An HTTP API: pictures go in, boxes come out as JSON. Needs FastAPI and python-multipart, which NiceGUI brings."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from pathlib import PureWindowsPath

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from mmdet.structures import DetDataSample
from starlette.datastructures import UploadFile
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect

from mmdet_lors.errors import UserError
from mmdet_lors.valid_json import to_json

from .inferencer import Inferencer
from .pictures import check_pixels, name_of
from .results import boxes

UPLOAD_SECONDS = 30
"""A request whose body takes longer to arrive loses its place in the queue."""
OVERHEAD = 1 << 16
"""Bytes of a body beside its pictures: names and headers."""
HOW = "send pictures as curl -F image=@picture.jpg does"


@dataclass(frozen=True)
class Limits:
    """What is accepted, at most.

    Args:
        max_bytes: size of a picture's file.
        max_pictures: pictures in a request; those of one size go through the detector at once.
        queue: requests that wait while one is answered.
    """

    max_bytes: int = 10_000_000
    max_pictures: int = 8
    queue: int = 16


def add_api(app: FastAPI, inferencer: Inferencer, limits: Limits, score_thr: float = 0.3) -> None:
    """Add ``POST /detect`` and ``GET /health``, and limit the body of every request, also of the app's other routes.

    Requests are answered one after another, so that the pictures of only one are in memory.

    Args:
        app: where they are added.
        inferencer: the detector.
        limits: what is accepted.
        score_thr: lowest score of a box, if the request has none of its own.
    """
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=limits.max_pictures * limits.max_bytes + OVERHEAD)
    turn = asyncio.Lock()
    inside = 0

    @app.get("/health")
    async def health() -> dict:
        return dict(requests=inside)

    @app.post("/detect")
    async def detect(request: Request) -> Response:
        nonlocal inside
        lowest = _score(request.query_params.get("score_thr", str(score_thr)))
        if inside > limits.queue:
            reason = f"{limits.queue} requests are waiting already: try again later"
            raise HTTPException(503, reason, headers={"Retry-After": "1"})
        inside += 1
        try:
            files = await asyncio.wait_for(_files(request, limits), UPLOAD_SECONDS)
            async with turn:
                rows = await run_in_threadpool(_rows, inferencer, files, lowest)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {UPLOAD_SECONDS} seconds") from None
        except ClientDisconnect:
            raise HTTPException(400, "the request ends too early") from None
        finally:
            inside -= 1
            await request.close()
        status = 200 if any("boxes" in row for row in rows) else 422
        return Response(to_json(rows), status, media_type="application/json")


def _score(text: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = nan
    if not 0 <= score <= 1:
        raise HTTPException(422, f"score_thr={text[:20]}: must be a number from 0 to 1")
    return score


async def _files(request: Request, limits: Limits) -> list[UploadFile]:
    """The pictures of a request; large ones are in temporary files without a name."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, f"the body is not multipart/form-data: {HOW}")
    form = await request.form(max_files=limits.max_pictures, max_fields=limits.max_pictures)
    for field, file in form.multi_items():
        if field != "image" or not isinstance(file, UploadFile):
            raise HTTPException(400, f"part {field[:20]!r} is no picture: {HOW}")
        if file.size > limits.max_bytes:
            raise HTTPException(413, f"{_name(file)} is larger than {limits.max_bytes / 10**6:g} MB")
    if not form:
        raise HTTPException(400, f"there is no picture: {HOW}")
    return form.getlist("image")


def _name(file: UploadFile) -> str:
    """The file's name, without folders of whatever system."""
    return PureWindowsPath(file.filename or "").name


def _rows(inferencer: Inferencer, files: Sequence[UploadFile], score_thr: float) -> list[dict]:
    """Each picture's result, as in a line of predictions.jsonl."""
    rows, pictures = [], [file.file.read() for file in files]
    for file, data, found in zip(files, pictures, _found(inferencer, pictures), strict=True):
        rows.append(dict(image=_name(file)))
        if isinstance(found, UserError):
            rows[-1]["error"] = str(found).replace(name_of(data), "it")
        else:
            height, width = found.ori_shape
            rows[-1] |= dict(width=width, height=height, boxes=boxes(found, inferencer.classes, score_thr))
    return rows


def _found(inferencer: Inferencer, pictures: Sequence[bytes]) -> list[DetDataSample | UserError]:
    """Each picture's predictions, or the reason why it has none; one by one if a picture has none."""
    try:
        for data in pictures:
            check_pixels(data, name_of(data))
        return [sample for _, sample in inferencer.stream(pictures, batch_size=len(pictures))]
    except UserError as error:
        return [error] if len(pictures) == 1 else [_found(inferencer, [data])[0] for data in pictures]
