-- Restore generations. Transaction ids are comparable only within the cluster that assigned them, and cursors compare
-- them. A restored database claims nothing, and in another cluster accepts nothing, until `surety restored` opens a new
-- restore generation.
--
-- A base backup keeps the cluster's identifier, so a copy that was recovered from it is known by its timeline, which
-- recovery changes. A takeover by a standby changes it as well. In live mode such a database is closed too: it accepts
-- and claims nothing, and no worker calls the provider. Then `surety restored` says that this is the place of business,
-- or `surety drill` that it is a copy. Where takeovers are automatic, the servers of business are listed instead. Then
-- any other server is closed.

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

create or replace function outbox.timeline() returns bigint
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
-- Read once per session. The control file would show a new timeline only after the first checkpoint.
declare
    v_known text := nullif(current_setting('surety.timeline', true), '');
begin
    if v_known is null and not pg_is_in_recovery() then
        v_known := ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint;
        perform set_config('surety.timeline', v_known, false);
    end if;
    return v_known;
end;
$$;

comment on function outbox.timeline() is
'The timeline on which this server writes; null on a standby.';

create or replace function outbox.server_address() returns text
language sql stable
begin atomic
    select coalesce(host(inet_server_addr()), 'local');
end;

comment on function outbox.server_address() is
'The address of this server as the session reaches it; local over a Unix socket.';

create or replace function outbox.closed_because(p_generation outbox.restore_generations) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_has_servers boolean;
begin
    if p_generation.system_identifier is distinct from outbox.system_identifier() then
        return 'cluster';
    end if;
    v_has_servers := exists (select from outbox.business_servers) and not p_generation.is_drill;
    -- Without the list, the timeline decides. On a standby it is null, and nothing can be written.
    if (not v_has_servers and p_generation.timeline is not distinct from outbox.timeline())
        or outbox.timeline() is null or not exists (select from surety.environment as e where e.livemode) then
        return null;
    elsif not v_has_servers then
        return 'timeline';
    elsif not exists (select from outbox.business_servers as s where s.address = outbox.server_address()) then
        return 'server';
    end if;
    return null;
end;
$$;

comment on function outbox.closed_because(outbox.restore_generations) is
'Why nothing is accepted and handled here. cluster: restored into another cluster; timeline: in live mode, recovered
from a backup, or a standby that took over; server: in live mode, none of the listed servers. Null: it is open.';

create or replace function outbox.restore_generation() returns outbox.restore_generations
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select e from outbox.restore_generations as e order by e.generation desc limit 1;
end;

comment on function outbox.restore_generation() is
'The newest restore generation, also in a closed database.';

create or replace function outbox.current_restore_generation() returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
-- In another cluster transaction ids start anew, and new events would lie before the handlers' cursors.
declare
    v_generation outbox.restore_generations;
    v_reason text;
begin
    select e.* into v_generation from outbox.restore_generations as e order by e.generation desc limit 1;
    v_reason := outbox.closed_because(v_generation);
    if v_reason is not null then
        raise exception using
            errcode = 'SU005', message = outbox.describe_closed(v_reason),
            hint = 'Run "surety restored" before anything is accepted or handled, or "surety drill" in a copy.';
    end if;
    return v_generation.generation;
end;
$$;

comment on function outbox.current_restore_generation() is
'The current restore generation. Raises SU005 in a database that is closed.';

create or replace function outbox.describe_closed(p_reason text) returns text
language sql immutable
begin atomic
    select
        case p_reason
            when 'cluster' then 'this database was restored into another cluster'
            when 'timeline' then
                'this database in live mode was restored from a backup, or a standby took over that is not listed'
            when 'server' then
                'this database in live mode runs on a server that is not listed as a server of business'
        end;
end;

comment on function outbox.describe_closed(text) is
'A sentence for a reason of outbox.closed_because.';

create or replace function outbox.provider_refusal(p_is_sandbox boolean) returns text
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_generation outbox.restore_generations := outbox.restore_generation();
    v_reason text := outbox.closed_because(v_generation);
begin
    if v_reason is not null then
        return outbox.describe_closed(v_reason)
            || ': run `surety restored` if it is the place of business, `surety drill` if it is a copy';
    elsif v_generation.is_drill and not p_is_sandbox then
        return 'this database is a copy, opened by `surety drill`: set SURETY_SANDBOX_URL, or use another database';
    end if;
    return null;
end;
$$;

comment on function outbox.provider_refusal(boolean) is
'Why workers of this database may send nothing to the provider, for a sandbox or the real one; null if they may.';

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

insert into outbox.restore_generations (generation, system_identifier, timeline, started_at, reason)
select 1, outbox.system_identifier(), outbox.timeline(), surety.time_now(), 'first deploy'
where not exists (select from outbox.restore_generations);
