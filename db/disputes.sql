-- Disputes: what the network asks back. A row holds what the last fetch told; merchants read it and give evidence.
--
--   advance   surety.advance_disputes: the fetch with the highest number wins; a changed status is an event
--   evidence  api.submit_evidence, merged here; surety.begin_evidence: what will be sent is committed first
--   deadline  surety.remind_evidence: an event before evidence is due
--   ask about  the sweep: surety.claim_dispute_questions
--   read      api.get_dispute, api.list_disputes

create or replace function api.show_dispute(d surety.disputes) returns table (document json)
language sql stable parallel safe
begin atomic
    -- The dispute as merchants see it; columns in the order of the document.
    select row_to_json(shown.*) from (
        select
            d.id as id,
            'dispute' as object,
            d.status as status,
            d.payment_id as payment,
            d.amount_minor as amount,
            d.withdrawn_minor as amount_withdrawn,
            d.currency as currency,
            d.reason as reason,
            json_build_object(
                'due_at', surety.iso(d.evidence_due_at),
                'given', coalesce(
                    (
                        select json_agg(given.field order by given.field)
                        from jsonb_object_keys(d.evidence) as given (field)
                    ),
                    '[]'::json
                ),
                'submit_asked_at', surety.iso(d.submit_asked_at)
            ) as evidence,
            json_build_object('name', d.provider, 'id', d.provider_id) as provider,
            surety.iso(d.created_at) as created_at,
            surety.iso(d.updated_at) as updated_at
    ) as shown;
end;

create or replace function surety.tell_dispute(d surety.disputes, p_type text, p_at timestamptz) returns void
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    select outbox.emit(
        'dispute', d.id, p_type,
        jsonb_build_object(
            'payment_id', d.payment_id, 'dispute_id', d.id, 'status', d.status, 'at', surety.iso(p_at),
            'amount_withdrawn', d.withdrawn_minor, 'evidence_revision', d.evidence_revision
        ),
        case when p_type <> 'dispute.evidence_given' then d.merchant_id end, null
    );
end;

create or replace function surety.dispute_status(p_kind text, p_data jsonb) returns text
language sql immutable parallel safe
begin atomic
    select coalesce(
        p_data ->> 'status',
        case p_kind
            when 'dispute_opened' then 'needs_response'
            when 'dispute_flagged' then 'warning_needs_response'
            else substr(p_kind, 9)
        end
    );
end;

create or replace function surety.dispute_withdrawn(p_kind text, p_amount_minor bigint) returns bigint
language sql immutable parallel safe
begin atomic
    select case when p_kind in ('dispute_opened', 'dispute_lost') then greatest(0, p_amount_minor) else 0 end;
end;

create or replace function surety.advance_disputes(p_facts surety.facts[], p_actor text) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Brings disputes to what the fetch with the highest number told; payments are locked. Returns the events' types.
declare
    v_now timestamptz := surety.time_now();
    v_known jsonb;
    v_changed surety.disputes [];
begin
    if not exists (select from unnest(p_facts) as f where f.kind like 'dispute\_%' and f.disregarded is null) then
        return '{}';
    end if;
    select jsonb_object_agg(d.provider_id, d.status) into v_known
    from unnest(p_facts) as f
    join surety.disputes as d on d.provider = f.provider and d.provider_account = f.account
        and d.provider_id = f.object_id;
    with told as (
        select distinct on (f.provider, f.account, f.object_id) f.*
        from unnest(p_facts) as f
        where f.kind like 'dispute\_%' and f.disregarded is null
        order by f.provider, f.account, f.object_id, f.revision desc
    ),
    written as (
        insert into surety.disputes as d (
            id, payment_id, merchant_id, status, amount_minor, withdrawn_minor, currency, reason, provider,
            provider_account, provider_id, revision, evidence_due_at, created_at, updated_at, ask_at
        )
        select
            surety.new_id('dp', v_now), p.id, p.merchant_id, s.status,
            greatest(1, coalesce((t.data ->> 'amount')::bigint, t.amount_minor)),
            surety.dispute_withdrawn(t.kind, t.amount_minor),
            t.currency, t.data ->> 'reason', t.provider, t.account, t.object_id, t.revision,
            (t.data ->> 'evidence_due_at')::timestamptz, v_now, v_now, v_now + k.ask_after
        from told as t
        join surety.payments as p on p.id = t.payment_id
        cross join lateral (select surety.dispute_status(t.kind, t.data) as status) as s
        left join surety.dispute_statuses as k on k.status = s.status
        order by t.payment_id, t.object_id
        on conflict (provider, provider_account, provider_id) do update
        set status = excluded.status, withdrawn_minor = excluded.withdrawn_minor, reason = excluded.reason,
            revision = excluded.revision, evidence_due_at = excluded.evidence_due_at, updated_at = excluded.updated_at,
            ask_at = excluded.ask_at,
            -- Evidence may be asked for again, as in an appeal.
            submit_asked_at = case when d.status = excluded.status or excluded.status not like '%needs\_response'
                then d.submit_asked_at end,
            reminded_at = case when d.status = excluded.status then d.reminded_at end
        where d.revision < excluded.revision
        returning d
    )
    select array_agg(w.d order by (w.d).id) into v_changed
    from written as w where (w.d).status is distinct from v_known ->> (w.d).provider_id;

    perform surety.tell_dispute(d, 'dispute.' || d.status, v_now) from unnest(v_changed) as d;
    insert into audit.entries (
        id, at, kind, actor, payment_id, merchant_id, from_state, to_state, outcome, reason, snapshot
    )
    select
        surety.new_id('aud', v_now), v_now, 'dispute', p_actor, d.payment_id, d.merchant_id,
        v_known ->> d.provider_id, d.status, 'done', d.reason,
        jsonb_build_object('dispute', d.id, 'object', d.provider_id, 'amount', d.amount_minor, 'currency', d.currency)
    from unnest(v_changed) as d;
    return array(select distinct 'dispute.' || d.status from unnest(v_changed) as d);
end;
$$;

create or replace function api.submit_evidence(p_request jsonb) returns api.outcome
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- {…, "dispute_id", "evidence": {field: text}, "submit"}: 202 and the dispute; what was given before is kept unless the
-- same field comes again. 404 not-found   409 wrong-state, detail {state}: submitted, over, or past its deadline
declare
    v_admitted api.admission := api.admit('POST /v1/disputes/{id}/evidence', p_request);
    v_dispute surety.disputes;
    v_takes boolean;
begin
    if (v_admitted.outcome).status is not null then
        return v_admitted.outcome;
    end if;
    select d.* into v_dispute from surety.disputes as d
    where d.id = p_request ->> 'dispute_id' and d.merchant_id = v_admitted.merchant_id
    for update;
    if not found then
        return api.refuse(v_admitted, 404, 'not-found', null);
    end if;
    v_takes := exists (select from surety.dispute_statuses as s where s.status = v_dispute.status and s.takes_evidence);
    if not v_takes or v_dispute.submit_asked_at is not null or v_dispute.evidence_due_at < v_admitted.admitted_at then
        return api.refuse(v_admitted, 409, 'wrong-state', jsonb_build_object(
            'state', v_dispute.status,
            'reason', case
                when v_dispute.submit_asked_at is not null then 'its evidence was submitted'
                when v_takes then 'its evidence was due by ' || surety.iso(v_dispute.evidence_due_at)
            end));
    end if;
    update surety.disputes as d
    set evidence = d.evidence || (p_request -> 'evidence'), evidence_revision = d.evidence_revision + 1,
        submit_asked_at = case when (p_request ->> 'submit')::boolean then v_admitted.admitted_at end,
        updated_at = v_admitted.admitted_at
    where d.id = v_dispute.id
    returning * into v_dispute;
    perform surety.tell_dispute(v_dispute, 'dispute.evidence_given', v_admitted.admitted_at);
    return api.conclude(
        v_admitted, p_request, v_dispute.payment_id, 202,
        (select shown.document::text from api.show_dispute(v_dispute) as shown),
        jsonb_build_object('dispute', v_dispute.id, 'submit', (p_request ->> 'submit')::boolean));
end;
$$;

create or replace function surety.begin_evidence(
    p_batch bigint, p_fence bigint, p_actor text, p_event_ids text[] default null
) returns table (
    event_id text, dispute_id text, payment_id text, todo text, operation text, idempotency_key text, request jsonb,
    account text, provider_id text, livemode boolean
)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- As surety.begin_calls. All that was given so far is sent, so only the last event of a dispute does anything; sending
-- it twice is telling it once. renew: what the key would replay is no answer.
declare
    v_now timestamptz := surety.time_now();
begin
    return query
    with events as (
        select
            e.event_id, d as dispute, p.livemode, c.status,
            'evidence:' || d.id || ':' || d.evidence_revision as operation,
            case
                when (e.payload ->> 'evidence_revision')::integer <> d.evidence_revision or s.status is null then 'skip'
                when c.status >= 500 or c.first_sent_at < v_now - interval '23 hours' then 'renew'
                else 'send'
            end as verdict
        from outbox.batch_events(p_batch, p_fence) as e
        join surety.disputes as d on d.id = e.aggregate_id
        join surety.payments as p on p.id = d.payment_id
        left join surety.dispute_statuses as s on s.status = d.status and s.takes_evidence
        left join surety.calls as c on c.payment_id = d.payment_id
            and c.operation = 'evidence:' || d.id || ':' || d.evidence_revision
        where p_event_ids is null or e.event_id = any(p_event_ids)
    ),
    written as (
        insert into surety.calls as c (payment_id, operation, idempotency_key, request, first_sent_at, last_sent_at)
        select
            (e.dispute).payment_id, e.operation, e.operation,
            jsonb_build_object(
                'evidence', (e.dispute).evidence, 'submit', (e.dispute).submit_asked_at is not null)::text,
            v_now, v_now
        from events as e where e.verdict <> 'skip'
        order by (e.dispute).payment_id, e.operation
        on conflict on constraint calls_pkey do update
        set sends = c.sends + 1, last_sent_at = excluded.last_sent_at, answered_at = null, status = null
        returning c.payment_id, c.operation, c.idempotency_key, c.request, c.sends
    ),
    told as (
        insert into audit.entries (id, at, kind, actor, payment_id, merchant_id, outcome, snapshot)
        select
            surety.new_id('aud', v_now), v_now, 'call', p_actor, w.payment_id, (e.dispute).merchant_id, 'sent',
            jsonb_build_object('operation', w.operation, 'key', w.idempotency_key, 'sends', w.sends)
        from events as e join written as w on w.operation = e.operation and e.verdict <> 'skip'
    )
    select
        e.event_id, (e.dispute).id, (e.dispute).payment_id, e.verdict, e.operation, w.idempotency_key,
        w.request::jsonb, (e.dispute).provider_account, (e.dispute).provider_id, e.livemode
    from events as e left join written as w on w.operation = e.operation and e.verdict <> 'skip'
    order by e.event_id;
end;
$$;

create or replace function surety.remind_evidence(p_before interval, p_limit integer default 500) returns text[]
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp
as $$
-- Disputes whose evidence is due within p_before and not submitted: an event each, once. Returns the events' types.
declare
    v_now timestamptz := surety.time_now();
    v_due surety.disputes [];
begin
    with due as (
        select d.id from surety.disputes as d
        join surety.dispute_statuses as s on s.status = d.status and s.takes_evidence
        where d.reminded_at is null and d.evidence_due_at < v_now + p_before and d.submit_asked_at is null
        order by d.evidence_due_at
        limit p_limit
        for update of d skip locked
    ),
    reminded as (
        update surety.disputes as d set reminded_at = v_now from due where d.id = due.id returning d
    )
    select array_agg(r.d) into v_due from reminded as r;
    if v_due is null then
        return '{}';
    end if;
    perform surety.tell_dispute(d, 'dispute.evidence_due', v_now) from unnest(v_due) as d;
    return array['dispute.evidence_due'];
end;
$$;

create or replace function surety.claim_dispute_questions(p_limit integer)
returns table (payment_id text, provider_id text, account text, livemode boolean)
language sql volatile security definer set search_path = pg_catalog, pg_temp
begin atomic
    with due as (
        select disputes.id
        from surety.disputes
        where
            disputes.ask_at <= surety.time_now()
            and not exists (
                select from surety.breakers
                where
                    breakers.provider = disputes.provider and breakers.account = disputes.provider_account
                    and breakers.opened_at is not null
            )
        order by disputes.ask_at
        limit p_limit
        for update skip locked
    ),

    claimed as (
        update surety.disputes
        set ask_at = surety.time_now() + dispute_statuses.ask_after
        from due, surety.dispute_statuses
        where disputes.id = due.id and disputes.status = dispute_statuses.status
        returning disputes.payment_id, disputes.provider_id, disputes.provider_account
    )

    select
        claimed.payment_id,
        claimed.provider_id,
        claimed.provider_account,
        environment.livemode
    from claimed
    cross join surety.environment;
end;
comment on function surety.claim_dispute_questions(integer) is
'Open disputes and inquiries that the sweep should fetch now, every few hours.';

create or replace function api.get_dispute(p_key_hash bytea, p_id text) returns table (merchant_id text, body text)
language sql stable security definer set search_path = pg_catalog, pg_temp
begin atomic
    select
        who.merchant_id,
        (
            select shown.document::text
            from surety.disputes cross join lateral api.show_dispute(disputes) as shown
            where disputes.id = p_id and disputes.merchant_id = who.merchant_id
        )
    from api.identify(p_key_hash) as who;
end;

create or replace function api.list_disputes(
    p_key_hash bytea, p_payment text, p_limit integer, p_starting_after text
) returns table (merchant_id text, body text)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
as $$
-- Newest first, all of a merchant's or those of one payment. No row: no such key.
declare
    v_merchant text := (select k.merchant_id from api.identify(p_key_hash) as k);
    v_ids text [];
begin
    if v_merchant is null then
        return;
    end if;
    if p_payment is null then
        v_ids := array(
            select d.id from surety.disputes as d
            where d.merchant_id = v_merchant and d.id < coalesce(p_starting_after, 'dp_g')
            order by d.id desc
            limit p_limit + 1
        );
    else
        v_ids := array(
            select d.id from surety.disputes as d
            where d.payment_id = p_payment and d.merchant_id = v_merchant and d.id < coalesce(p_starting_after, 'dp_g')
            order by d.id desc
            limit p_limit + 1
        );
    end if;
    return query
    select
        v_merchant,
        json_build_object(
            'object', 'list',
            'data', coalesce(
                (
                    select json_agg(shown.document order by d.id desc)
                    from surety.disputes as d cross join lateral api.show_dispute(d) as shown
                    where d.id = any(v_ids[1:p_limit])
                ),
                '[]'::json
            ),
            'has_more', cardinality(v_ids) > p_limit
        )::text;
end;
$$;
