# SPDX-License-Identifier: Apache-2.0
"""Load test: what is sent (workload.py, dataset.py), to whom (target.py), by whom (client.py) and when
(load.py, plan.py, search.py); what it means (metrics.py, intervals.py) and how it is shown (results.py,
compare.py, plots.py, page.py). docs/load_testing.md says what is measured.
"""
