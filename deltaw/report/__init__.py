"""The report of one run: a single HTML file that needs no network, no script and no second file.

Read in the order in which the page is made: `quantities` (a number → words), `contents` (run folder → values),
`curves` (metric lines → curves), `headline` and `tables` (values → sentences, cards, rows), `plots` (curves → SVG),
`page` (all of it → report.html). Beside it, `adapter_page` (inspect.html) and `sweep_page` (sweep.html).
"""

from deltaw.report.contents import ReportContents, read_contents
from deltaw.report.page import write_report

__all__ = ["ReportContents", "read_contents", "write_report"]
