"""The two databases: how each is opened, locked, copied and looked through, and what each says in its own words.

Only `rnnq.db` comes here, and who needs a few words of SQL (`rnnq.databases.words`). psycopg is imported when an
address of PostgreSQL is opened, and not before.
"""
