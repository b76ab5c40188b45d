"""Planted critics of edits: each is fooled by one of the two ways to hack the reward of an editor."""

from planted.critics import Planted, Scores, View

from firm.images import decode_image
from firm.shapes.comparison import Picture
from firm.shapes.edit_teacher import Edit

EXECUTION, CONSISTENCY = "execution", "consistency"


class FondOfCopies(Planted):
    """Takes an edit that keeps everything for one that does what was asked: an untouched image has full marks."""

    def scores(self, view: View) -> Scores:
        return {**view.truth, EXECUTION: view.truth[CONSISTENCY]}


class BlindToBackground(Planted):
    """Sees what became of the objects, and takes every background for the source's."""

    def scores(self, view: View) -> Scores:
        before, after = (Picture.of(decode_image(png, "a planted critic's item")) for png in view.item.images)
        edit = Edit.of(view.item.prompt.text, before, after)
        vars(edit.seen)["ground"] = 0.0  # a cached property
        return {**view.truth, CONSISTENCY: float(edit.consistency)}
