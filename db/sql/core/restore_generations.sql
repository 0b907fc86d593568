-- Restore generations. Transaction ids are comparable only within the cluster that assigned them, and cursors compare
-- them. A restored database claims nothing, and in another cluster accepts nothing, until `surety restored` opens a new
-- restore generation.

create or replace function outbox.system_identifier() returns bigint
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
-- The control file is read once per session: its value cannot change within one.
declare
    v_known text := nullif(current_setting('surety.system_identifier', true), '');
begin
    if v_known is null then
        select control.system_identifier into v_known from pg_control_system() as control;
        perform set_config('surety.system_identifier', v_known, false);
    end if;
    return v_known;
end;
$$;

comment on function outbox.system_identifier() is
'The identifier of the PostgreSQL cluster.';

create or replace function outbox.current_restore_generation() returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
-- In another cluster transaction ids start anew, and new events would lie before the handlers' cursors.
declare
    v_generation outbox.restore_generations;
begin
    select e.* into v_generation from outbox.restore_generations as e order by e.generation desc limit 1;
    if v_generation.system_identifier is distinct from outbox.system_identifier() then
        raise exception 'this database was restored into another cluster' using
            errcode = 'SU005', hint = 'Run "surety restored" before anything is accepted or handled.';
    end if;
    return v_generation.generation;
end;
$$;

comment on function outbox.current_restore_generation() is
'The current restore generation. Raises SU005 in a database that was restored into another cluster.';

create or replace function outbox.has_future_transactions(p_generation integer) returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
    v_last xid8 := (
        select e.xid from outbox.events as e where e.generation = p_generation order by e.generation desc,
            e.xid desc limit 1
    );
begin
    return v_last >= pg_snapshot_xmax(pg_current_snapshot())
        and v_last is distinct from pg_current_xact_id_if_assigned();
end;
$$;

comment on function outbox.has_future_transactions(integer) is
'Whether an event comes from a transaction id that this cluster has not assigned yet, because it was restored to an
earlier time. Null if the restore generation has no events.';

create or replace function outbox.begin_restore_generation(p_reason text) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_old outbox.restore_generations;
    v_handler outbox.handlers;
begin
    lock table outbox.restore_generations in exclusive mode;
    select e.* into v_old from outbox.restore_generations as e order by e.generation desc limit 1;
    if v_old.system_identifier = outbox.system_identifier()
        and outbox.has_future_transactions(v_old.generation) is not true then
        return v_old.generation;
    end if;
    for v_handler in select h.* from outbox.handlers as h order by h.handler for update loop
        insert into outbox.retries (handler, event_id, due_at)
        select v_handler.handler, unclaimed.id, v_now
        from (
            select e.id from outbox.events as e
            join outbox.handler_events as t on t.handler = v_handler.handler and t.event_type = e.type
            where e.generation = v_handler.generation
                and not pg_visible_in_snapshot(e.xid, v_handler.seen)
                and (
                    v_handler.goal is null or not pg_visible_in_snapshot(e.xid, v_handler.goal)
                    or (e.xid, e.id) > (v_handler.at_xid, v_handler.at_id)
                )
            union
            select unnest(b.event_ids) from outbox.batches as b where b.handler = v_handler.handler
        ) as unclaimed
        order by unclaimed.id
        on conflict (handler, event_id) do update set due_at = excluded.due_at;
    end loop;
    delete from outbox.batches;
    insert into outbox.restore_generations (generation, system_identifier, started_at, reason)
    values (v_old.generation + 1, outbox.system_identifier(), v_now, p_reason);
    update outbox.handlers set generation = v_old.generation + 1, seen = '1:1:', goal = null, at_xid = '0', at_id = '';
    perform setval('outbox.fences', nextval('outbox.fences') + 1000000);
    perform setval('surety.fetch_numbers', nextval('surety.fetch_numbers') + 1000000);
    return v_old.generation + 1;
end;
$$;

comment on function outbox.begin_restore_generation(text) is
'Opens a new restore generation after a restore and returns it; without a restore it changes nothing. Events that a
handler had not claimed and events in batches become retries that are due at once. All cursors start at the beginning
of the new generation.';

create or replace function outbox.check_restore_generation() returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
declare
    v_generation integer := outbox.current_restore_generation();
begin
    if outbox.has_future_transactions(v_generation) then
        raise exception 'events come from transaction ids that are not assigned yet: this database was restored'
            using errcode = 'SU005', hint = 'Run "surety restored" before anything is accepted or handled.';
    end if;
end;
$$;

comment on function outbox.check_restore_generation() is
'Raises SU005 in a database that was restored into another cluster, or to an earlier time of the same cluster.';

insert into outbox.restore_generations (generation, system_identifier, started_at, reason)
select 1, outbox.system_identifier(), surety.time_now(), 'first deploy'
where not exists (select from outbox.restore_generations);
