-- Deliveries as they are sent, and endpoints as the API shows them.

create or replace function outbox.read_deliveries(p_event_ids text[])
returns table (event_id text, full_document text, thin_document text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
begin
    return query
    select
        shown.id,
        json_build_object(
            'id', shown.id, 'object', 'event', 'type', shown.document -> 'type',
            'timestamp', shown.document -> 'created_at', 'data', shown.document -> 'data', 'current', now_is.state
        )::text,
        json_build_object(
            'id', shown.id, 'object', 'event', 'type', shown.document -> 'type',
            'timestamp', shown.document -> 'created_at',
            'data', json_build_object(
                'id', shown.document #> '{data,id}', 'object', shown.document #> '{data,object}',
                'version', shown.document #> '{data,version}'),
            'current', now_is.state
        )::text
    from api.show_events(p_event_ids) as shown
    join outbox.events as e on e.id = shown.id
    cross join lateral (
        select coalesce(
            (
                select json_build_object('version', p.version, 'state', p.state)
                from surety.payments as p where p.id = e.aggregate_id),
            (
                select json_build_object('version', r.version, 'state', r.state)
                from surety.refunds as r where r.id = e.aggregate_id),
            (
                select json_build_object('version', d.version, 'status', d.status)
                from surety.disputes as d where d.id = e.aggregate_id),
            (select json_build_object('version', c.version) from surety.customers as c where c.id = e.aggregate_id)
        ) as state offset 0
    ) as now_is;
end;
$$;

comment on function outbox.read_deliveries(text[]) is
'Events as webhooks say them: data is the object at that version, or in the thin form its id and version; current is the
state now. No row for an event whose object is not shown any more.';

create or replace function api.show_webhook_endpoint(p outbox.webhook_endpoints) returns table (document json)
language sql stable
begin atomic
    select row_to_json(shown.*) from (
        select
            p.id as id,
            'webhook_endpoint' as object,
            p.url as url,
            p.description as description,
            p.event_types as event_types,
            p.payload as payload,
            p.api_version as api_version,
            p.concurrency as concurrency,
            p.rate_max as rate_max,
            case
                when p.deleted_at is not null then 'deleted'
                when p.disabled_at is not null then 'disabled'
                when p.failed_attempts > 0 then 'failing'
                else 'enabled'
            end as status,
            p.disabled_because as disabled_because,
            surety.format_time(p.disabled_at) as disabled_at,
            surety.format_time(p.failing_since) as failing_since,
            outbox.failure_percent(p.failing_since, p.failed_attempts, surety.time_now()) as failure_percent,
            (
                select json_build_object(
                    'waiting', count(*) filter (where delivery_retries.given_up_at is null),
                    'given_up', count(delivery_retries.given_up_at)
                )
                from outbox.delivery_retries
                where delivery_retries.endpoint_id = p.id
            ) as undelivered,
            coalesce((
                select json_agg(webhook_secrets.public_key order by webhook_secrets.id desc)
                from outbox.webhook_secrets
                where
                    webhook_secrets.endpoint_id = p.id and webhook_secrets.public_key is not null
                    and (webhook_secrets.expires_at is null or webhook_secrets.expires_at > surety.time_now())
            ), '[]') as public_keys,
            coalesce((
                select json_agg(
                    json_build_object(
                        'from', surety.format_time(webhook_ranges.skipped_from),
                        'to', surety.format_time(webhook_ranges.skipped_to),
                        'events', webhook_ranges.skipped_count,
                        'chosen_at', surety.format_time(webhook_ranges.chosen_at)
                    ) order by webhook_ranges.number desc
                )
                from outbox.webhook_ranges
                where webhook_ranges.endpoint_id = p.id and webhook_ranges.is_skipped
            ), '[]') as skipped,
            surety.format_time(p.created_at) as created_at,
            surety.format_time(p.updated_at) as updated_at,
            surety.format_time(p.deleted_at) as deleted_at
    ) as shown;
end;

comment on function api.show_webhook_endpoint(outbox.webhook_endpoints) is
'A webhook endpoint as the API shows it: without its secrets, with its public keys and the ranges that it skipped.';
