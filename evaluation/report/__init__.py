"""The evaluation report: one HTML page that needs nothing beside itself.

inputs.py reads what lies beside metrics.json, sections.py writes what the page says of it, charts.py and hands.py draw,
samples.py makes pictures and meshes, page.py puts all together with page.css, page.js and viewer.js.
"""
