"""The evaluation report: one self-contained HTML page.

inputs.py reads and checks a run's files, sections.py turns them into the data of views.py, with charts.py, hands.py and
samples.py for what is drawn, and page.py renders page.html.j2 with page.css, page.js and viewer.js.
"""
