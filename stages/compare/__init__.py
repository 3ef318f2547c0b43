"""Results side by side: means over seeds, paired differences with intervals, baselines.

from sae_pipe.stages.compare import compare, render
from sae_pipe.stages.evaluation.results import read_results

print(render(compare(read_results(["results"]), ["mask_p", "arch", "l0"]), "markdown"))
"""

from .formats import FORMATS, render
from .table import Comparison, compare

__all__ = ["FORMATS", "Comparison", "compare", "render"]
