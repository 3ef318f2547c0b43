"""Judging SAEs: many on one read of the data, with intervals, into result files.

`engine.py` is the main path; `judged.py` what is judged, `latents.py` how its latents are held,
`bootstrap.py` where intervals come from, `results.py` the files. Metrics are in stages/metrics/.
"""
