"""Reports of a comparison: a table on the terminal, figures, one self-contained page."""

from voltana_ctrl.report.figures import check_plot, write_plot
from voltana_ctrl.report.identification import write_fit_plot
from voltana_ctrl.report.page import write_html
from voltana_ctrl.report.study import Study
from voltana_ctrl.report.terminal import print_table

__all__ = ["Study", "check_plot", "print_table", "write_fit_plot", "write_html", "write_plot"]
