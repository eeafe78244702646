"""`earmark.json`, which describes an ONNX model, and the files that it names in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from earmark.core import errors
from earmark.core.options import FunctionToApply

if TYPE_CHECKING:
    from pathlib import Path

NAME = "earmark.json"
#: More than enough for the description, for 100,000 labels, and for a minute at 192 kHz.
_MOST_JSON, _MOST_LABELS, MOST_CLIP = 2**16, 2**22, 2**25
#: A path in the folder. It cannot be absolute, begin with a dot, or hold what ONNX reads as a sign.
FILE = r"^\w[\w .+-]*(/\w[\w .+-]*)*$"
FileName = Annotated[str, StringConstraints(pattern=FILE, max_length=255)]


class Description(BaseModel):
    """The content of `earmark.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: FileName = "model.onnx"
    labels: FileName = "labels.txt"
    sample_rate: Annotated[int, Field(ge=1000, le=384_000)]
    window_s: Annotated[float, Field(gt=0, le=120)]
    hop_s: Annotated[float | None, Field(gt=0)] = None
    #: The shortest window of a graph that takes any length; None: the window.
    min_s: Annotated[float | None, Field(gt=0)] = None
    input: str
    output: str
    #: The output with the embeddings.
    embeddings: str | None = None
    function_to_apply: FunctionToApply
    #: A clip, and the scores that the model gives it, by label.
    reference: FileName
    scores: Annotated[dict[str, float], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Described:
    """A folder with an `earmark.json`; no file that it names lies outside."""

    name: str
    folder: Path
    #: The commit of a hub model.
    revision: str | None

    def refused(self, reason: object) -> errors.ServiceError:
        """Return the error of a model that cannot be used."""
        return errors.ServiceError(reason=f"{self.name} cannot be used: {reason}.")

    def file(self, name: str, most: int) -> Path:
        """Return a file of the folder of at most so many bytes.

        Raises:
            ServiceError: it is missing, too large, or a link to outside of the folder.
        """
        path = self.folder / name
        target = path.resolve()
        # In the hub's cache, the files of a snapshot are links to blobs two folders above.
        root = self.folder.parents[1] if self.revision else self.folder
        if not target.is_relative_to(root.resolve()):
            raise self.refused(f"{name} leads out of its folder")
        if not target.is_file():
            raise self.refused(f"it has no file {name}")
        if target.stat().st_size > most:
            raise self.refused(f"{name} is larger than {most} bytes")
        return path

    def description(self) -> Description:
        """Read `earmark.json`; raise ServiceError if it is not as documented."""
        content = self.file(NAME, _MOST_JSON).read_bytes()
        try:
            return Description.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(map(str, first["loc"]))
            raise self.refused(f"{NAME}, {field or 'as a whole'}: {first['msg']}") from error

    def labels(self, name: str) -> tuple[str, ...]:
        """Return the labels, one a line of their file, in the order of the scores."""
        try:
            text = self.file(name, _MOST_LABELS).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.refused(f"{name} is not UTF-8") from error
        labels = tuple(line.strip() for line in text.splitlines())
        if not all(labels) or len(set(labels)) < len(labels):
            raise self.refused(f"{name} has an empty line, or a label twice")
        return labels
