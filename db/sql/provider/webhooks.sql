-- The provider's events, from webhooks or from its list: each is stored once, without client secrets and the data of
-- erased payers, with an event for the handler `apply_webhooks`.

create or replace function surety.receive_webhooks(p_webhooks jsonb) returns table (n integer, is_new boolean)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
as $$
declare
    v_now timestamptz := surety.time_now();
    v_generation integer := outbox.current_restore_generation();
    -- A statement of its own: the next one sees what was erased before this one got its lock.
    v_has_erased boolean := exists (select from surety.erasures);
begin
    return query
    with given as (
        select
            w.n, w.provider, w.account, w.livemode, w.event_id, w.type, w.headers, w.address,
            surety.new_id('whk', v_now) as id,
            case when v_has_erased then surety.redact_new_event(w.provider, w.account, w.body) else w.body end as body
        from jsonb_to_recordset(p_webhooks) as w (
            n integer, provider text, account text, livemode boolean, event_id text, type text, headers jsonb,
            body text, address text
        )
    ),
    keyed as (
        insert into surety.provider_event_keys (provider, account, event_id, provider_event_id)
        select g.provider, g.account, g.event_id, g.id from given as g
        order by g.provider, g.account, g.event_id, g.n
        on conflict (provider, account, event_id) do nothing
        returning provider_event_id
    ),
    stored as (
        insert into surety.provider_events (id, provider, account, livemode, event_id, type, headers, body, received_at)
        select g.id, g.provider, g.account, g.livemode, g.event_id, g.type, g.headers, g.body, v_now
        from given as g join keyed as k on k.provider_event_id = g.id
        order by g.id
    ),
    queued as (
        insert into outbox.events (id, aggregate_type, aggregate_id, type, payload, generation, at)
        select
            surety.new_id('evt', v_now), 'webhook', g.id, 'webhook.received',
            jsonb_build_object('provider', g.provider, 'event', g.event_id, 'type', g.type), v_generation, v_now
        from given as g join keyed as k on k.provider_event_id = g.id
        order by g.id
    ),
    audited as (
        insert into audit.entries (id, at, kind, actor, address, outcome, snapshot)
        select
            surety.new_id('aud', v_now), v_now, 'webhook', g.provider, g.address,
            case when k.provider_event_id is null then 'repeated' when g.headers = '{}' then 'listed'
                else 'received' end,
            jsonb_build_object('event', g.event_id, 'type', g.type)
        from given as g left join keyed as k on k.provider_event_id = g.id
    )
    select g.n, k.provider_event_id is not null from given as g left
        join keyed as k on k.provider_event_id = g.id order by g.n;
end;
$$;

comment on function surety.receive_webhooks(jsonb) is
'Stores webhooks whose signatures are verified: [{"n", "provider", "account", "livemode", "event_id", "type", "headers",
"body", "address"}]. is_new is false for an event that was received before.';

create or replace function surety.store_rejected_webhook(
    p_provider text, p_reason text, p_detail text, p_headers jsonb, p_body bytea, p_address text,
    p_body_bytes integer default null
) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_now timestamptz := surety.time_now();
    v_kept_max constant integer := 1000;
begin
    if not audit.count_refusal('webhook', p_reason, '') then
        return false;
    end if;
    insert into surety.rejected_webhooks (id, provider, reason, headers, body, body_bytes, received_at)
    values (
        surety.new_id('rej', v_now), p_provider, p_detail, p_headers, substr(p_body, 1, 4096),
        coalesce(p_body_bytes, length(p_body)), v_now
    );
    perform audit.write_entry('webhook', p_provider, 'rejected', p_detail, p_address => p_address);
    delete from surety.rejected_webhooks
    where id in (
        select r.id from surety.rejected_webhooks as r order by r.id desc offset v_kept_max
        for update skip locked
    );
    return true;
end;
$$;

comment on function surety.store_rejected_webhook(text, text, text, jsonb, bytea, text, integer) is
'Counts a refused webhook: its signature is invalid, or it is signed but is no event. The first hundred of an hour and
reason are audited and stored, with the first 4096 bytes of the body; the newest 1000 are kept. p_body may be a part of
the body, which has p_body_bytes. True if it was stored.';

create or replace function surety.events_not_received(p_provider text, p_account text, p_event_ids text[]) returns
text[] language sql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
begin atomic
    select coalesce(array_agg(listed.event_id), '{}')
    from unnest(p_event_ids) as listed (event_id)
    where not exists (
        select from surety.provider_event_keys
        where
            provider_event_keys.provider = p_provider and provider_event_keys.account = p_account
            and provider_event_keys.event_id = listed.event_id
    );
end;

comment on function surety.events_not_received(text, text, text[]) is
'The events of a provider''s list that no webhook has brought yet.';

create or replace function surety.accounts_of_merchants(p_accounts text[]) returns text[]
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select coalesce(array_agg(distinct merchants.provider_account), '{}')
    from surety.merchants
    where merchants.provider_account = any(p_accounts);
end;

comment on function surety.accounts_of_merchants(text[]) is
'Those of the accounts at the provider that merchants of ours have.';

create or replace function surety.store_polled_events(p_events jsonb) returns bigint
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    -- Without headers, so that listed events can't pass for signed webhooks.
    select count(*) filter (where taken.is_new)
    from surety.receive_webhooks((
        select jsonb_agg(listed.event || '{"headers": {}}')
        from jsonb_array_elements(p_events) as listed (event)
    )) as taken;
end;

comment on function surety.store_polled_events(jsonb) is
'Stores events of the provider''s list as surety.receive_webhooks does; returns how many were new.';

create or replace function surety.read_provider_events(p_batch bigint, p_fence bigint)
returns table (
    event_id text, provider_event_id text, source text, provider text, account text, livemode boolean, type text,
        body text,
    received_at timestamptz, failures integer
)
language sql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
begin atomic
    select
        e.event_id,
        provider_events.id,
        -- Listed events have no headers: they bear no signature.
        case provider_events.headers when '{}' then 'poll' else 'webhook' end,
        provider_events.provider,
        provider_events.account,
        provider_events.livemode,
        provider_events.type,
        provider_events.body,
        provider_events.received_at,
        e.failures
    from outbox.batch_events(p_batch, p_fence) as e
    inner join surety.provider_events on e.aggregate_id = provider_events.id
    order by e.event_id;
end;

comment on function surety.read_provider_events(bigint, bigint) is
'The provider''s events of a batch of webhook.received events; source is webhook or poll.';
