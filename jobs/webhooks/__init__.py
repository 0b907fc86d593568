"""Deliveries to merchants' webhook endpoints (docs/decisions/0028): a part of each worker.

sender       finds endpoints with something to be sent, claims batches, starts and records their deliveries
deliveries   sends a batch: signatures, concurrency, rate, what an answer means
connections  connections to checked addresses only
addresses    which addresses may be reached
"""
