# SPDX-License-Identifier: Apache-2.0
"""This project's routes, one file per resource."""
