-- Commands after a restore: `surety restored` opens a restored database for business, `surety drill` opens a copy that
-- can't do business. `surety servers` lists the servers of business, among which a standby takes over without a person.

create or replace function outbox.was_restored(p_generation outbox.restore_generations) returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        (p_generation.timeline is distinct from outbox.timeline() and outbox.timeline() is not null)
        or outbox.closed_because(p_generation) is not null
        or outbox.has_future_transactions(p_generation.generation) is true;
end;

comment on function outbox.was_restored(outbox.restore_generations) is
'Whether something shows that the database was restored since, or that a standby took over.';

create or replace function outbox.open_restore_generation(p_reason text, p_is_drill boolean) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_old outbox.restore_generations;
    v_handler outbox.handlers;
begin
    lock table outbox.restore_generations in exclusive mode;
    v_old := outbox.restore_generation();
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
    insert into outbox.restore_generations (generation, system_identifier, timeline, is_drill, started_at, reason)
    values (
        v_old.generation + 1, outbox.system_identifier(), outbox.timeline(), p_is_drill, v_now, p_reason
    );
    update outbox.handlers set generation = v_old.generation + 1, seen = '1:1:', goal = null, at_xid = '0', at_id = '';
    perform setval('outbox.fences', nextval('outbox.fences') + 1000000);
    perform setval('surety.fetch_numbers', nextval('surety.fetch_numbers') + 1000000);
    return v_old.generation + 1;
end;
$$;

comment on function outbox.open_restore_generation(text, boolean) is
'Opens a new restore generation and returns it. Events that a handler had not claimed and events in batches become
retries that are due at once. All cursors start at the beginning of the new generation.';

create or replace function outbox.begin_restore_generation(p_reason text) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_old outbox.restore_generations;
begin
    lock table outbox.restore_generations in exclusive mode;
    v_old := outbox.restore_generation();
    if v_old.is_drill then
        raise exception 'this database is a copy, opened by `surety drill`: it can never do business' using
            errcode = 'SU012', hint = 'Restore the backup again.';
    elsif not outbox.was_restored(v_old) then
        return v_old.generation;
    end if;
    insert into outbox.business_servers (address)
    select outbox.server_address() where exists (select from outbox.business_servers)
    on conflict (address) do nothing;
    return outbox.open_restore_generation(p_reason, false);
end;
$$;

comment on function outbox.begin_restore_generation(text) is
'Opens a new restore generation after a restore and returns it; without a restore it changes nothing. If servers of
business are listed, this one becomes one of them. SU012 in a copy.';

create or replace function outbox.begin_drill(p_reason text) returns integer
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_old outbox.restore_generations;
begin
    lock table outbox.restore_generations in exclusive mode;
    v_old := outbox.restore_generation();
    if v_old.is_drill and not outbox.was_restored(v_old) then
        return v_old.generation;
    elsif not outbox.was_restored(v_old) then
        raise exception 'nothing shows that this database is a copy: it is open for business' using errcode = 'SU012';
    end if;
    return outbox.open_restore_generation(p_reason, true);
end;
$$;

comment on function outbox.begin_drill(text) is
'Opens a restored copy for a drill and returns its restore generation: from then on workers refuse every provider but a
sandbox, and the copy can''t do business again. SU012 in a database that was not restored.';

create or replace function outbox.set_business_servers(p_addresses text[], p_actor text default session_user)
returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_is_changed boolean;
begin
    lock table outbox.business_servers in exclusive mode;
    if cardinality(p_addresses) > 0 and outbox.server_address() <> all (p_addresses) then
        raise exception 'this server, %, must be one of them', outbox.server_address() using errcode = 'SU012';
    end if;
    select count(*) > 0 into v_is_changed
    from outbox.business_servers as s full join unnest(p_addresses) as a (address) on a.address = s.address
    where s.address is null or a.address is null;
    if v_is_changed then
        delete from outbox.business_servers;
        insert into outbox.business_servers (address)
        select distinct a.address from unnest(p_addresses) as a (address);
        perform surety.audit_operator_action(
            p_actor, null, 'servers of business set', jsonb_build_object('addresses', p_addresses)
        );
    end if;
    perform surety.await_standbys();
    return v_is_changed;
end;
$$;

comment on function outbox.set_business_servers(text[], text) is
'Lists the servers that may do business in live mode, so that a standby among them takes over without a person; an empty
list ends this. Returns whether it changed. SU012 unless the present server is in the list.';
