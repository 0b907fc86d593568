-- Results of calls to providers.

create or replace function surety.record_call_results(p_actor text, p_results jsonb) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Facts and refusals each lock their payments, so one array holds either: two transactions could deadlock otherwise.
declare
    v_now timestamptz := surety.time_now();
    v_facts jsonb;
    v_types text[] := '{}';
    v_entries jsonb;
    v_first_payment text;
    v_last_payment text;
begin
    select jsonb_agg(f.fact) into v_facts
    from jsonb_array_elements(p_results) as r (result)
    cross join lateral jsonb_array_elements(
        case when jsonb_typeof(r.result -> 'facts') = 'array' then r.result -> 'facts' else '[]' end
    ) as f (fact);
    if v_facts is not null then
        v_types := surety.record_facts(v_facts, p_actor);
    end if;
    if exists (select from jsonb_array_elements(p_results) as r (result) where r.result ? 'refused') then
        if v_facts is not null then
            raise exception 'facts and refusals are recorded in transactions of their own' using errcode = 'SU009';
        end if;
        v_types := surety.record_refused_calls(p_results, p_actor);
    end if;
    if exists (select from jsonb_array_elements(p_results) as r (result) where r.result ? 'customer') then
        v_types := v_types || surety.record_customer_results(p_results);
    end if;
    perform surety.open_discrepancy(
        r.discrepancy ->> 'kind', r.discrepancy ->> 'subject', 'critical', r.discrepancy ->> 'detail',
        (
            select jsonb_agg(
                case
                    when jsonb_typeof(named.field -> 'there') = 'number'
                        then surety.differing_amount(
                            named.field ->> 'field', (named.field ->> 'here')::bigint,
                            (named.field ->> 'there')::bigint)
                    else surety.differing_value(
                        named.field ->> 'field', named.field ->> 'here', named.field ->> 'there')
                end
                order by named.place)
            from jsonb_array_elements(r.discrepancy -> 'fields') with ordinality as named (field, place)
        ),
        coalesce(r.discrepancy ->> 'source_here', r.payment_id), r.discrepancy ->> 'source_there', v_now,
        p_payment_id => r.payment_id)
    from jsonb_to_recordset(p_results) as r (payment_id text, discrepancy jsonb)
    where r.discrepancy is not null and not (
        -- Another result has recorded the object.
        r.discrepancy ->> 'kind' = 'unrecorded' and exists (
            select from jsonb_array_elements(v_facts) as f (fact)
            where f.fact ->> 'object_id' = r.discrepancy ->> 'subject'
        )
    )
    order by r.discrepancy ->> 'kind', r.discrepancy ->> 'subject';

    select min(r.payment_id collate "C"), max(r.payment_id collate "C") into v_first_payment, v_last_payment
    from jsonb_to_recordset(p_results) as r (payment_id text, operation text, status smallint, undone_send integer)
    where r.operation is not null and coalesce(r.status, r.undone_send) is not null;
    if v_first_payment is not null then
        -- Sorted, because another worker may record results of the same calls. A refused send counts by its number: a
        -- result that is recorded late, or twice, proves nothing about another send.
        update surety.calls as c
        set answered_at = case when r.status is null then c.answered_at else v_now end,
            status = coalesce(r.status, c.status),
            refused_through = case c.refused_through
                when r.undone_send - 1 then r.undone_send else c.refused_through
            end
        from (
            select g.payment_id, g.operation, max(g.status) as status, min(g.undone_send) as undone_send
            from jsonb_to_recordset(p_results) as g (
                payment_id text, operation text, status smallint, undone_send integer
            )
            where coalesce(g.status, g.undone_send) is not null
            group by g.payment_id, g.operation
            order by g.payment_id, g.operation
        ) as r
        where c.payment_id = r.payment_id and c.operation = r.operation
            -- The bounds exclude partitions before the update begins.
            and c.payment_id between v_first_payment and v_last_payment;
    end if;

    select jsonb_agg(jsonb_build_object(
        'kind', 'answer', 'actor', p_actor, 'payment_id', r.payment_id, 'outcome', r.outcome,
        'reason', r.error, 'duration_ms', r.duration_ms,
        'snapshot', coalesce(r.snapshot, '{}') || jsonb_build_object('operation', r.operation, 'status', r.status)))
    into v_entries
    from jsonb_to_recordset(p_results) as r (
        payment_id text, operation text, status smallint, outcome text, error text, duration_ms numeric, snapshot jsonb
    )
    where r.operation is not null and r.outcome is not null;
    if v_entries is not null then
        perform audit.write_entries(v_entries);
    end if;
    return v_types;
end;
$$;

comment on function surety.record_call_results(text, jsonb) is
'Records results of calls: [{"payment_id"?, "operation"?, "status"?, "duration_ms"?, "outcome", "snapshot"?,
"facts"?: [], "refused"?: {code, decline_code, message}, "customer"?: as for
surety.record_customer_results, "refund_id"?, "discrepancy"?: {kind, subject, detail, "fields":
[{field, here, there}] (numbers are minor units), "source_here"?: else the payment, "source_there"}, "error"?,
"undone_send"?: the number of a send that was refused for want of access or not made}]. Facts and refusals in one
array are an error (SU009). Returns the types of the events made.';

create or replace function surety.release_unfinished(p_batch bigint, p_fence bigint, p_results jsonb) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
declare
    v_held boolean := true;
    v_released record;
begin
    for v_released in
        select r.release_seconds, r.release_cause, r.outage, array_agg(r.event_id) as ids, min(r.error) as reason
        from jsonb_to_recordset(p_results) as r (
            batch_id bigint, fence bigint, event_id text, error text, outage text, release_seconds numeric,
            release_cause text
        )
        where r.batch_id = p_batch and r.fence = p_fence and r.release_seconds is not null
        group by r.release_seconds, r.release_cause, r.outage
    loop
        v_held := outbox.release_events(
            p_batch, p_fence, v_released.ids, make_interval(secs => v_released.release_seconds::double precision),
            v_released.release_cause, coalesce(v_released.reason, 'given back'), v_released.outage) and v_held;
    end loop;
    return v_held;
end;
$$;

comment on function surety.release_unfinished(bigint, bigint, jsonb) is
'Gives back uncounted those events of a batch whose results have release_seconds. False if the lease is lost.';

create or replace function surety.finish_events(p_results jsonb) returns bigint[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Batches are the last locks of a transaction, in the order of their ids.
declare
    v_lost bigint[] := '{}';
    v_batch record;
    v_held boolean;
begin
    for v_batch in
        select
            r.batch_id, r.fence,
            jsonb_agg(jsonb_build_object('event_id', r.event_id, 'error', r.error, 'outage', r.outage))
                filter (where r.error is not null and r.release_seconds is null) as failed,
            array_agg(r.event_id) filter (where r.error is null and r.release_seconds is null) as done,
            bool_or(r.release_seconds is not null) as has_released
        from jsonb_to_recordset(p_results) as r (
            batch_id bigint, fence bigint, event_id text, error text, outage text, release_seconds numeric
        )
        where r.event_id is not null
        group by r.batch_id, r.fence
        order by r.batch_id, r.fence
    loop
        v_held := true;
        if v_batch.has_released then
            v_held := surety.release_unfinished(v_batch.batch_id, v_batch.fence, p_results);
        end if;
        if v_batch.failed is not null then
            v_held := outbox.fail_events(v_batch.batch_id, v_batch.fence, v_batch.failed) and v_held;
        end if;
        if v_batch.done is not null then
            v_held := outbox.complete_events(v_batch.batch_id, v_batch.fence, v_batch.done) and v_held;
        end if;
        if not v_held then
            v_lost := v_lost || v_batch.batch_id;
        end if;
    end loop;
    return v_lost;
end;
$$;

comment on function surety.finish_events(jsonb) is
'Finishes the events of results, given as surety.record_results takes them: completes, fails or releases each. Returns
the batches whose lease is lost, whose events stay as they are.';

create or replace function surety.record_results(p_actor text, p_results jsonb)
returns table (lost_batches bigint[], event_types text[])
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
set plan_cache_mode = force_generic_plan
as $$
declare
    v_types text[] := surety.record_call_results(p_actor, p_results);
    v_results jsonb := p_results;
    v_lost bigint[] := '{}';
begin
    if exists (select from jsonb_array_elements(p_results) as r (result) where r.result ? 'outage') then
        v_results := surety.uncount_outage_failures(p_results);
    end if;
    if exists (select from jsonb_array_elements(p_results) as r (result) where r.result ? 'event_id') then
        v_lost := surety.finish_events(v_results);
    end if;
    return query select v_lost, v_types;
end;
$$;

comment on function surety.record_results(text, jsonb) is
'Records results as surety.record_call_results does. Those of events also have "batch_id", "fence", "event_id" and
perhaps "outage", or "release_seconds" and "release_cause"; the batches may be of several handlers.
They are recorded even if a lease is lost; finishing the events needs it. An event with release_seconds is given back
uncounted. An event with an error has failed, unless surety.uncount_outage_failures finds an outage of its provider. All
other events are finished. lost_batches are those that another worker holds.';
