-- Named locks of sessions, for work that one worker does at a time. They end with their connection.

create or replace function surety.take_lock(p_name text, p_idle_timeout interval) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Any login can take any advisory lock. A key that a login without the workers' role holds is passed over, and the next
-- one is tried: all workers come to the same key, as long as that login holds the first.
declare
    v_keys_max constant integer := 16;
    v_key bigint;
begin
    for v_turn in 0 .. v_keys_max - 1 loop
        v_key := hashtextextended('surety:' || p_name, v_turn);
        if pg_try_advisory_lock(v_key) then
            perform set_config('idle_session_timeout', extract(epoch from p_idle_timeout) * 1000 || 'ms', false);
            return v_key;
        end if;
        if exists (
            select from pg_locks as l
            join pg_stat_activity as a on a.pid = l.pid
            where l.locktype = 'advisory' and l.granted and l.objsubid = 1
                and l.database = (select d.oid from pg_database as d where d.datname = current_database())
                and l.classid = ((v_key >> 32) & 4294967295)::oid and l.objid = (v_key & 4294967295)::oid
                and pg_has_role(a.usesysid, 'surety_worker', 'member')
        ) then
            return null;
        end if;
    end loop;
    raise exception 'the lock % is held by a login that is no worker''s: see pg_locks', p_name
        using errcode = 'lock_not_available';
end;
$$;

comment on function surety.take_lock(text, interval) is
'Takes a lock for this session and returns its key, for pg_advisory_unlock; null if a worker holds it. The server ends
the session, with its locks, once it is idle for p_idle_timeout. Locks that other logins hold on its keys do not count.
Raises lock_not_available if such a login holds all sixteen.';
