"""The answer of the study `parity`, imported when it is asked for."""

from tracker.studies.base import Study, StudyResult


class Parity(Study):
    """Compare what even and odd layers cost."""

    name = "parity"
    question = "Do even layers matter more than odd ones?"
    assumptions = ("Layers are taken as they are.",)
    intact = True  # no layer is removed beneath
    layers = 2  # whole layers that a cell removes at least

    def answer(self, context, subjects):
        """Answer the question for every measured cell."""
        result = StudyResult()
        for subject in subjects:
            drops = [run.drop.value or 0 for run in subject.record.whole_layers]
            excess = sum(drops[::2]) - sum(drops[1::2])
            counts = "more" if excess > self.settings.at_least else "no more"
            result.add(f"{subject.name}: even layers cost {counts} than odd ones.")
        return result
