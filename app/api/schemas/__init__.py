"""Request and response bodies as structs, one file per resource.

They decode requests and describe them in the OpenAPI document; tests/db/test_contract.py compares them with the
documents that the database renders.
"""
