-- Epochs: transaction ids are comparable only within the cluster that gave them. A dump restored into another cluster
-- accepts and claims nothing until it has a new one.

create or replace function outbox.system_identifier() returns bigint
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
-- The cluster's identity. A session never sees it change, so it reads the control file once and keeps it in a setting.
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

create or replace function outbox.current_restore_generation() returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
-- The restore generation in force. Refuses to answer in a database that was restored into another cluster: its
-- transaction ids began anew there, and what is written now would lie before the handlers' cursors.
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

create or replace function outbox.has_future_transactions(p_generation integer) returns boolean
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
-- Whether an event stems from a transaction yet to come: the same cluster, restored, went back in time.
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

create or replace function outbox.begin_restore_generation(p_reason text) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Opens a new restore generation after a restore into another cluster, or into one that went back in time. Events that
-- a handler had not taken become retries due at once, batches are given back, cursors start at the new generation's
-- beginning. Returns the restore generation. Without need it changes nothing.
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
        select v_handler.handler, untaken.id, v_now
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
        ) as untaken
        order by untaken.id
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

create or replace function outbox.check_restore_generation() returns void
language plpgsql stable set search_path = pg_catalog, pg_temp
as $$
-- Also refuses a restore into the same cluster that went back in time: an event from a transaction yet to come.
declare
    v_generation integer := outbox.current_restore_generation();
begin
    if outbox.has_future_transactions(v_generation) then
        raise exception 'events stem from transactions that have not happened here: this database was restored'
            using errcode = 'SU005', hint = 'Run "surety restored" before anything is accepted or handled.';
    end if;
end;
$$;

insert into outbox.restore_generations (generation, system_identifier, started_at, reason)
select 1, outbox.system_identifier(), surety.time_now(), 'first deploy'
where not exists (select from outbox.restore_generations);
