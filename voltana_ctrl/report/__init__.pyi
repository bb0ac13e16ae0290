from voltana_ctrl.report.figures import check_plot as check_plot
from voltana_ctrl.report.figures import write_plot as write_plot
from voltana_ctrl.report.identification import write_fit_plot as write_fit_plot
from voltana_ctrl.report.page import write_html as write_html
from voltana_ctrl.report.study import Study as Study
from voltana_ctrl.report.terminal import print_table as print_table
