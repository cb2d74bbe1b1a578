# SPDX-License-Identifier: Apache-2.0
"""The health check of the images: status 0 while the server in the container is ready.

It knows the port and whether to use TLS from the server's variables in the environment, not from flags or a file.
"""

import http.client
import os
import ssl
import sys

TIMEOUT_S = 4

port = int(os.environ.get("PVQ_PORT") or 8000)
if os.environ.get("PVQ_SSL_CERTFILE"):
    context = ssl.create_default_context()
    # The certificate is for the name by which clients know the server, not for this address.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=context)
else:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
connection.request("GET", "/ready")
sys.exit(connection.getresponse().status != 200)
