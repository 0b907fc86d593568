-- Durability of answers that write nothing.
--
-- With a synchronous standby, PostgreSQL delays a commit until the standby has it. A session that is ended during this
-- wait leaves its commit visible here, and perhaps absent there. An answer that only reads such rows would confirm
-- something that a failover loses. A commit waits only if its transaction wrote WAL; a transaction id is not enough.

create or replace function surety.await_standbys() returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
begin
    if current_setting('synchronous_standby_names') <> ''
        and current_setting('synchronous_commit') not in ('off', 'local') then
        perform pg_logical_emit_message(true, 'surety', '');
    end if;
end;
$$;

comment on function surety.await_standbys() is
'Makes the commit of this transaction wait for the synchronous standbys, as the commit of a writing transaction does, so
that everything that it has read is as durable as after its own commit. Called before an answer that repeats an earlier
one. Does nothing without a synchronous standby, or in a session whose commits do not wait for it.';
