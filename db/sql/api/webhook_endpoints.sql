-- Merchants' webhook endpoints: create, read, list, update, enable, disable, rotate secrets, replay, delete.

create or replace function api.read_sealing_key() returns table (id text, public_key bytea)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        sealing_keys.id,
        sealing_keys.public_key
    from outbox.sealing_keys
    order by sealing_keys.published_at desc, sealing_keys.id desc
    limit 1;
end;

comment on function api.read_sealing_key() is
'The public key for which new signing secrets are encrypted. No row until a worker has had SURETY_WEBHOOK_KEY.';

create or replace function api.add_webhook_secrets(p_endpoint_id text, p_secrets jsonb, p_at timestamptz) returns void
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    insert into outbox.webhook_secrets (id, endpoint_id, scheme, sealing_key, sealed, public_key, created_at)
    select
        surety.new_id('whs', p_at),
        p_endpoint_id,
        s.scheme,
        s.sealing_key,
        decode(s.sealed, 'base64'),
        s.public_key,
        p_at
    from jsonb_to_recordset(p_secrets) as s (scheme text, sealing_key text, sealed text, public_key text);
end;

comment on function api.add_webhook_secrets(text, jsonb, timestamptz) is
'Adds signing secrets: an array of scheme, sealing_key, sealed (base64) and public_key.';

create or replace function api.admit_endpoint_command(
    p_route text, p_request jsonb, out admitted api.admission, out endpoint outbox.webhook_endpoints
)
language plpgsql volatile set search_path = pg_catalog, pg_temp
as $$
begin
    admitted := api.admit_command(p_route, 'webhooks:write', p_request);
    if admitted.outcome is null then
        select w.* into endpoint from outbox.webhook_endpoints as w
        where w.id = p_request ->> 'webhook_endpoint_id' and w.merchant_id = admitted.merchant_id
            and w.deleted_at is null
        for no key update;
        if not found then
            admitted.outcome := api.refuse_command(admitted, 'not-found', null);
        end if;
    end if;
end;
$$;

comment on function api.admit_endpoint_command(text, jsonb) is
'Admits a command about an endpoint of the merchant, and locks it. The outcome is set if there is none.';

create or replace function api.complete_endpoint_command(
    p_admitted api.admission, p_request jsonb, p_endpoint_id text, p_status integer, p_snapshot jsonb default '{}'
) returns api.outcome
language sql volatile set search_path = pg_catalog, pg_temp
begin atomic
    select api.complete_command(
        p_admitted, p_request, null, p_status, shown.document::text,
        jsonb_build_object('webhook_endpoint', p_endpoint_id) || p_snapshot
    )
    from outbox.webhook_endpoints cross join lateral api.show_webhook_endpoint(webhook_endpoints) as shown
    where webhook_endpoints.id = p_endpoint_id;
end;

comment on function api.complete_endpoint_command(api.admission, jsonb, text, integer, jsonb) is
'Completes a command about an endpoint, with the endpoint as its answer. Neither address nor secret is audited.';

create or replace function api.find_url_problem(p_merchant_id text, p_url text) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp
begin atomic
    select jsonb_build_object(
        'field', '/url', 'rule', 'https', 'limit', null, 'given', null,
        'message', 'url must begin with https:// in live mode'
    )
    from surety.merchants
    where merchants.id = p_merchant_id and merchants.livemode and p_url not like 'https://%';
end;

comment on function api.find_url_problem(text, text) is
'The rule that an endpoint''s address breaks, as details of invalid-request; null without one.';

create or replace function api.create_webhook_endpoint(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_admitted api.admission := api.admit_command('POST /v1/webhook_endpoints', 'webhooks:write', p_request);
    v_now timestamptz := v_admitted.admitted_at;
    v_endpoints_max constant integer := 16;
    v_endpoint outbox.webhook_endpoints;
    v_problem jsonb;
begin
    if not v_admitted.outcome is null then
        return v_admitted.outcome;
    end if;
    v_problem := api.find_url_problem(v_admitted.merchant_id, p_request ->> 'url');
    if v_problem is null and v_endpoints_max <= (
        select count(*) from outbox.webhook_endpoints as w
        where w.merchant_id = v_admitted.merchant_id and w.deleted_at is null
    ) then
        v_problem := jsonb_build_object(
            'field', '/url', 'rule', 'max_entries', 'limit', v_endpoints_max, 'given', v_endpoints_max,
            'message', 'a merchant has at most ' || v_endpoints_max || ' webhook endpoints: delete one first');
    end if;
    if v_problem is not null then
        return api.refuse_command(v_admitted, 'invalid-request', v_problem);
    end if;
    insert into outbox.webhook_endpoints (
        id, merchant_id, url, description, event_types, payload, api_version, concurrency, rate_max, created_at,
        updated_at, generation, seen
    )
    select
        surety.new_id('we', v_now), v_admitted.merchant_id, p_request ->> 'url', p_request ->> 'description',
        array(select distinct t.type from jsonb_array_elements_text(p_request -> 'event_types') as t (type) order by 1),
        p_request ->> 'payload', p_request ->> 'api_version', (p_request ->> 'concurrency')::smallint,
        (p_request ->> 'rate_max')::smallint, v_now, v_now, n.generation, n.seen
    from outbox.position_now() as n
    returning * into v_endpoint;
    perform outbox.begin_range(v_endpoint, outbox.position_of(v_endpoint), v_admitted.actor, v_now);
    perform api.add_webhook_secrets(v_endpoint.id, p_request -> 'secrets', v_now);
    return api.complete_endpoint_command(v_admitted, p_request, v_endpoint.id, 201);
end;
$$;

comment on function api.create_webhook_endpoint(jsonb) is
'Creates an endpoint, which gets the events that are committed from now on. p_request as for api.admit_command, with
url, description, event_types, payload, concurrency, rate_max, and secrets as for api.add_webhook_secrets. 201 and the
endpoint. Problem: invalid-request, detail {field, rule, limit, given, message}.';

create or replace function api.update_webhook_endpoint(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_taken record;
    v_old outbox.webhook_endpoints;
    v_new outbox.webhook_endpoints;
    v_problem jsonb;
begin
    select t.* into v_taken from api.admit_endpoint_command('POST /v1/webhook_endpoints/{id}', p_request) as t;
    if not (v_taken.admitted).outcome is null then
        return (v_taken.admitted).outcome;
    end if;
    v_old := v_taken.endpoint;
    v_problem := api.find_url_problem(v_old.merchant_id, p_request ->> 'url');
    if v_problem is not null then
        return api.refuse_command(v_taken.admitted, 'invalid-request', v_problem);
    end if;
    update outbox.webhook_endpoints as w
    set
        url = coalesce(p_request ->> 'url', w.url),
        description = case when p_request ? 'description' then p_request ->> 'description' else w.description end,
        event_types = case
            when p_request ? 'event_types' then array(
                select distinct t.type from jsonb_array_elements_text(p_request -> 'event_types') as t (type)
                order by 1)
            else w.event_types
        end,
        payload = coalesce(p_request ->> 'payload', w.payload),
        api_version = coalesce(p_request ->> 'sent_version', w.api_version),
        concurrency = coalesce((p_request ->> 'concurrency')::smallint, w.concurrency),
        rate_max = case when p_request ? 'rate_max' then (p_request ->> 'rate_max')::smallint else w.rate_max end,
        updated_at = (v_taken.admitted).admitted_at
    where w.id = v_old.id
    returning w.* into v_new;
    if v_new.event_types <> v_old.event_types then
        perform outbox.end_range(v_old);
        perform outbox.begin_range(
            v_new, outbox.position_of(v_new), (v_taken.admitted).actor, (v_taken.admitted).admitted_at);
    end if;
    return api.complete_endpoint_command(v_taken.admitted, p_request, v_new.id, 200, jsonb_build_object(
        'fields', to_jsonb(array(
            select given.name
            from unnest(array['url', 'description', 'event_types', 'payload', 'concurrency', 'rate_max'])
                as given (name)
            where p_request ? given.name))));
end;
$$;

comment on function api.update_webhook_endpoint(jsonb) is
'Changes the given fields of an endpoint. A new filter applies to events that its cursor has not passed. p_request as
for api.admit_command, with webhook_endpoint_id and the fields. 200 and the endpoint. Problems: not-found,
invalid-request.';

create or replace function api.switch_webhook_endpoint(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_taken record;
    v_skipped bigint;
begin
    select t.* into v_taken
    from api.admit_endpoint_command(
        case
            when p_request ? 'from' then 'POST /v1/webhook_endpoints/{id}/enable'
            else 'POST /v1/webhook_endpoints/{id}/disable'
        end, p_request) as t;
    if not (v_taken.admitted).outcome is null then
        return (v_taken.admitted).outcome;
    end if;
    if p_request ->> 'from' = 'hours' and p_request ->> 'hours' is null then
        return api.refuse_command(v_taken.admitted, 'invalid-request', jsonb_build_object(
            'field', '/hours', 'rule', 'required', 'limit', null, 'given', null,
            'message', 'hours is required if from is hours'));
    end if;
    if p_request ? 'from' then
        select e.skipped into v_skipped
        from outbox.enable_endpoint(
            (v_taken.endpoint).id, p_request ->> 'from', (p_request ->> 'hours')::integer, (v_taken.admitted).actor
        ) as e;
    else
        perform outbox.disable_endpoint((v_taken.endpoint).id, 'merchant', (v_taken.admitted).actor);
    end if;
    return api.complete_endpoint_command(
        v_taken.admitted, p_request, (v_taken.endpoint).id, 200,
        jsonb_strip_nulls(jsonb_build_object('from', p_request -> 'from', 'skipped', v_skipped)));
end;
$$;

comment on function api.switch_webhook_endpoint(jsonb) is
'Enables an endpoint, with from (there, hours, now) and hours, or disables it, without them. p_request as for
api.admit_command, with webhook_endpoint_id. 200 and the endpoint. Problem: not-found.';

create or replace function api.rotate_webhook_secret(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_taken record;
    v_ends timestamptz;
begin
    select t.* into v_taken
    from api.admit_endpoint_command('POST /v1/webhook_endpoints/{id}/rotate_secret', p_request) as t;
    if not (v_taken.admitted).outcome is null then
        return (v_taken.admitted).outcome;
    end if;
    v_ends := (v_taken.admitted).admitted_at + make_interval(hours => (p_request ->> 'overlap_hours')::integer);
    update outbox.webhook_secrets as s set expires_at = v_ends
    where s.endpoint_id = (v_taken.endpoint).id and (s.expires_at is null or s.expires_at > v_ends);
    delete from outbox.webhook_secrets as s
    where s.endpoint_id = (v_taken.endpoint).id and s.expires_at <= (v_taken.admitted).admitted_at;
    perform api.add_webhook_secrets(
        (v_taken.endpoint).id, p_request -> 'secrets', (v_taken.admitted).admitted_at);
    return api.complete_endpoint_command(
        v_taken.admitted, p_request, (v_taken.endpoint).id, 200,
        jsonb_build_object('overlap_hours', p_request -> 'overlap_hours'));
end;
$$;

comment on function api.rotate_webhook_secret(jsonb) is
'Adds new signing secrets to an endpoint; those before stay valid for overlap_hours. p_request as for api.admit_command,
with webhook_endpoint_id and secrets as for api.add_webhook_secrets. 200 and the endpoint. Problem: not-found.';

create or replace function api.delete_webhook_endpoint(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_taken record;
begin
    select t.* into v_taken from api.admit_endpoint_command('DELETE /v1/webhook_endpoints/{id}', p_request) as t;
    if not (v_taken.admitted).outcome is null then
        return (v_taken.admitted).outcome;
    end if;
    perform outbox.delete_endpoint((v_taken.endpoint).id, (v_taken.admitted).actor);
    return api.complete_endpoint_command(v_taken.admitted, p_request, (v_taken.endpoint).id, 200);
end;
$$;

comment on function api.delete_webhook_endpoint(jsonb) is
'Deletes an endpoint. p_request as for api.admit_command, with webhook_endpoint_id. 200 and the endpoint. Problem:
not-found.';

create or replace function api.replay_webhook_events(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_taken record;
    v_count bigint;
begin
    select t.* into v_taken
    from api.admit_endpoint_command('POST /v1/webhook_endpoints/{id}/replay', p_request) as t;
    if not (v_taken.admitted).outcome is null then
        return (v_taken.admitted).outcome;
    end if;
    if p_request ->> 'events' is null and p_request ->> 'from' is null and p_request ->> 'before' is null
        and not (p_request ->> 'undelivered')::boolean
    then
        return api.refuse_command(v_taken.admitted, 'invalid-request', jsonb_build_object(
            'field', '/events', 'rule', 'required', 'limit', null, 'given', null,
            'message', 'give events, from, before, or undelivered: which events are to be sent again'));
    end if;
    v_count := outbox.replay_events(
        (v_taken.endpoint).id,
        case
            when p_request ->> 'events' is not null
                then array(select e.id from jsonb_array_elements_text(p_request -> 'events') as e (id))
        end,
        (p_request ->> 'from')::timestamptz, (p_request ->> 'before')::timestamptz,
        (p_request ->> 'undelivered')::boolean, (p_request ->> 'count_only')::boolean, (v_taken.admitted).actor);
    return api.complete_command(
        v_taken.admitted, p_request, null, 200,
        json_build_object(
            'object', 'webhook_replay', 'webhook_endpoint', (v_taken.endpoint).id, 'events', v_count,
            'is_sent', not (p_request ->> 'count_only')::boolean
        )::text,
        jsonb_build_object('webhook_endpoint', (v_taken.endpoint).id, 'events', v_count));
end;
$$;

comment on function api.replay_webhook_events(jsonb) is
'Sends events to an endpoint again, or counts them only (count_only): by events, by from and before, or undelivered.
p_request as for api.admit_command, with webhook_endpoint_id. 200 and the count. Problem: not-found.';

create or replace function api.get_webhook_endpoint(p_key_hash bytea, p_id text, p_address text default '')
returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        (
            select shown.document::text
            from outbox.webhook_endpoints cross join lateral api.show_webhook_endpoint(webhook_endpoints) as shown
            where
                webhook_endpoints.id = p_id and webhook_endpoints.merchant_id = who.merchant_id
                and webhook_endpoints.deleted_at is null
        )
    from api.identify_merchant(p_key_hash, 'read', p_address) as who;
end;

comment on function api.get_webhook_endpoint(bytea, text, text) is
'An endpoint of the merchant; body is null if it has none of that id. No row: the key may not read.';

create or replace function api.list_webhook_endpoints(p_key_hash bytea, p_address text default '')
returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        json_build_object(
            'object', 'list', 'has_more', false, 'data', coalesce((
                select json_agg(shown.document order by webhook_endpoints.id desc)
                from outbox.webhook_endpoints cross join lateral api.show_webhook_endpoint(webhook_endpoints) as shown
                where webhook_endpoints.merchant_id = who.merchant_id and webhook_endpoints.deleted_at is null
            ), '[]')
        )::text
    from api.identify_merchant(p_key_hash, 'read', p_address) as who;
end;

comment on function api.list_webhook_endpoints(bytea, text) is
'All endpoints of the merchant, newest first. No row: the key may not read.';

create or replace function api.list_deliveries(
    p_key_hash bytea, p_endpoint_id text, p_outcome text, p_event_id text, p_limit integer, p_starting_after text,
    p_address text default ''
) returns table (merchant_id text, body text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    v_merchant text := (select k.merchant_id from api.identify_merchant(p_key_hash, 'read', p_address) as k);
begin
    if v_merchant is null then
        return;
    end if;
    if not exists (
        select from outbox.webhook_endpoints as w
        where w.id = p_endpoint_id and w.merchant_id = v_merchant and w.deleted_at is null
    ) then
        return query select v_merchant, null::text;
        return;
    end if;
    if p_starting_after is not null and not exists (
        select from outbox.delivery_attempts as a where a.endpoint_id = p_endpoint_id and a.id = p_starting_after
    ) then
        perform api.refuse_cursor();
    end if;
    return query
    select v_merchant, api.render_page(
        array(
            select json_build_object(
                'id', a.id, 'object', 'delivery', 'event', a.event_id, 'outcome', a.outcome, 'attempt', a.attempt,
                'status', a.status, 'error', a.error, 'answer', a.answer, 'duration_ms', a.duration_ms,
                'created_at', surety.format_time(surety.time_of_id(a.id)))
            from outbox.delivery_attempts as a
            where a.endpoint_id = p_endpoint_id and a.id < coalesce(p_starting_after, 'dat_g')
                and (p_outcome is null or a.outcome = p_outcome)
                and (p_event_id is null or a.event_id = p_event_id)
            order by a.id desc
            limit p_limit + 1
        ),
        p_limit);
end;
$$;

comment on function api.list_deliveries(bytea, text, text, text, integer, text, text) is
'A page of an endpoint''s delivery log, newest first, by outcome and event; body is null if the merchant has no such
endpoint. p_starting_after: the last id of the page before. No row: the key may not read.';
