"""HTTP for the API and the receiver: authentication, batching, validation, problems, load shedding, serving."""
