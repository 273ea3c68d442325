"""The VPP side: asynchronous client, requests and objects. Nothing here knows the kernel."""
